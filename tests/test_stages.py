"""What stages ask of a model: losses that no split of a step changes, and a reference in the arithmetic of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from align.chat.encoded import Encoded, EncodedPair
from align.data.examples import Message, Messages, Preference
from align.data.prepared import DataReport, PreparedData
from align.errors import AlignError
from align.memory import Budget
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.logps import trained_logps
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.preference_losses import (
    Pair,
    apo_zero_loss,
    cpo_loss,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from align.progress import Progress
from align.recipe.settings import DpoLoss, DpoSettings, EvaluationSettings, SigmoidLoss
from align.stages.dpo import _Dpo
from align.stages.encoding import Desk
from align.stages.objectives import ComparedPair, PreferenceLoss, RatedLoss, RatedRow
from align.stages.reference import rotated
from align.stages.stage import Inputs
from align.steps import autocast


def row(*ids: int, prompt: int = 2) -> Encoded:
    return Encoded(list(ids), [place >= prompt for place in range(len(ids))])


def pair(first: int, probability: float | None) -> ComparedPair:
    chosen, rejected = row(first, 4, 5, 6), row(first, 4, 7, 8, 9)
    return ComparedPair(EncodedPair(chosen, rejected, 2, None, probability), -3.0, -9.0)


def test_a_soft_label_counts_beside_rows_without_one(tiny_llama: Path) -> None:
    model = load_policy(source_of(tiny_llama), precision="float32")
    loss = PreferenceLoss(SigmoidLoss(), beta=0.1)
    pairs = [pair(20, None), pair(30, 0.6)]
    with torch.no_grad():
        together, _ = loss(model, pairs)
        apart = sum(loss(model, [one])[0] for one in pairs)
    assert float(together) == pytest.approx(float(apart), abs=1e-5)


# The family, from rows to its equations ----------------------------------------------------------------------------------

COMPARED = [
    ComparedPair(EncodedPair(row(20, 4, 5, 6), row(20, 4, 7, 8, 9), 2, None, None), -9.0, -20.0),
    ComparedPair(
        EncodedPair(row(30, 31, 32, 33, 9, prompt=4), row(30, 31, 32, 33, 7, 8, prompt=4), 4, None, None), -8.0, -7.5
    ),
]
BETA = 0.3
FAMILY: dict[str, tuple[dict[str, Any], Any]] = {  # settings that are none of the defaults; the equation with them
    "sigmoid": ({"label_smoothing": 0.2}, lambda p, r, _: sigmoid_loss(p, r, beta=BETA, label_smoothing=0.2)),
    "robust": ({"label_smoothing": 0.3}, lambda p, r, _: robust_loss(p, r, beta=BETA, label_smoothing=0.3)),
    "ipo": ({}, lambda p, r, n: ipo_loss(p, r, n, beta=BETA)),
    "hinge": ({}, lambda p, r, _: hinge_loss(p, r, beta=BETA)),
    "apo-zero": ({}, lambda p, r, _: apo_zero_loss(p, r, beta=BETA)),
    "simpo": ({"target_margin": 0.9}, lambda p, _, n: simpo_loss(p, n, beta=BETA, target_margin=0.9)),
    "orpo": ({}, lambda p, _, n: orpo_loss(p, n, beta=BETA)),
    "cpo": ({"answer_weight": 0.4}, lambda p, _, n: cpo_loss(p, n, beta=BETA, answer_weight=0.4)),
}


@pytest.fixture(scope="module")
def policy(tiny_llama: Path) -> nn.Module:
    return load_policy(source_of(tiny_llama), precision="float32")


def plain_logps(model: nn.Module, rows: list[Encoded]) -> Tensor:
    """Summed log-probabilities of trained tokens, (B,), from all logits of one row after the other."""
    found = []
    for one in rows:
        with torch.no_grad():
            logps = model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        places = [at for at in range(1, len(one.ids)) if one.trained[at]]
        found.append(sum(logps[at - 1, one.ids[at]] for at in places))
    return torch.stack(found)


def compared(kind: str, **settings: Any) -> PreferenceLoss:
    return PreferenceLoss(loss_of(kind, **settings), beta=BETA)


def loss_of(kind: str, **settings: Any) -> Any:
    return DpoSettings.model_validate({"kind": "dpo", "data": "x", "loss": {"kind": kind, **settings}}).loss


def test_the_loss_and_margin_of_pairs_with_a_given_reference_by_hand(policy: nn.Module) -> None:
    (chosen,), (rejected,) = (plain_logps(policy, [side]).tolist() for side in sides_of(COMPARED[:1]))
    margin = BETA * ((chosen - -9.0) - (rejected - -20.0))
    assert abs(margin) > 0.5, "far from where policy and reference agree"
    with torch.no_grad():
        loss, numbers = compared("sigmoid")(policy, COMPARED[:1])
    assert float(loss) == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)
    assert numbers == {"accuracy": float(margin > 0), "margin": pytest.approx(margin, rel=1e-4)}


def sides_of(pairs: list[ComparedPair]) -> list[Encoded]:
    return [one.pair.chosen for one in pairs] + [one.pair.rejected for one in pairs]


@pytest.mark.parametrize("kind", FAMILY)
def test_each_loss_on_pairs_is_its_equation_with_the_settings_of_the_recipe(kind: str, policy: nn.Module) -> None:
    """Log-probabilities are sums over the replies, and so are the numbers of tokens; prompts count nowhere."""
    settings, equation = FAMILY[kind]
    sides = sides_of(COMPARED)
    reference = Pair(torch.tensor([-9.0, -8.0]), torch.tensor([-20.0, -7.5]))
    tokens = Pair(torch.tensor([2.0, 1.0]), torch.tensor([3.0, 2.0]))
    assert [side.labels for side in sides] == [*tokens.chosen, *tokens.rejected]
    expected = equation(Pair(*plain_logps(policy, sides).chunk(2)), reference, tokens)
    with torch.no_grad():
        loss, _ = compared(kind, **settings)(policy, COMPARED)
    assert float(loss) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_every_loss_of_the_family_is_held_against_its_equation() -> None:
    kinds = {loss.model_fields["kind"].annotation for loss in get_args(get_args(DpoLoss)[0])}
    assert {get_args(kind)[0] for kind in kinds} == {*FAMILY, "kto"}


def test_kto_is_its_equation_with_the_weights_of_the_recipe(policy: nn.Module) -> None:
    """Its baseline is that of the replies to other prompts, and not of those that are rated."""
    replies = [row(20, 4, 5, 6), row(30, 31, 32, 9, prompt=3), row(40, 41, 7, 8, 9)]
    others = rotated(replies, [2, 3, 2], 8)
    reference, mismatched = torch.tensor([-14.0, -5.0, -17.0]), torch.tensor([-13.0, -9.0, -20.0])
    good = torch.tensor([True, False, False])
    rows = [
        RatedRow(one, bool(good[n]), float(reference[n]), others[n], float(mismatched[n]))
        for n, one in enumerate(replies)
    ]
    objective = RatedLoss(
        loss_of("kto", desirable_weight=1.5, undesirable_weight=0.6), beta=BETA,
        budget=Budget.of(DpoSettings(kind="dpo", data="x")),
    )  # fmt: skip
    baseline = kto_kl(plain_logps(policy, others), mismatched)
    assert baseline > 0.1
    expected = kto_loss(
        plain_logps(policy, replies), reference, good, baseline, beta=BETA, desirable_weight=1.5, undesirable_weight=0.6
    )
    with torch.no_grad():
        loss, numbers = objective(policy, objective.prepared(policy, rows))
    assert float(loss) == pytest.approx(float(expected.sum()), rel=1e-4)
    assert numbers["kl"] == pytest.approx(3 * float(baseline), rel=1e-4)


# The reference -----------------------------------------------------------------------------------------------------------


def test_kto_puts_replies_to_prompts_that_ask_something_else() -> None:
    rows = [row(10, 11, 1), row(10, 11, 2), row(20, 21, 3), row(20, 21, 4), row(10, 11, 5)]
    mismatched = rotated(rows, [2] * 5, 8)
    assert [one.ids for one in mismatched] == [[10, 11, 3], [10, 11, 3], [20, 21, 5], [20, 21, 5], [10, 11, 3]]
    assert [one.ids[2] for one in rotated(rows[:2], [2, 2], 8)] == [2, 1]
    assert [len(one.ids) for one in rotated([row(1, 2, 3), row(4, 5, *range(9))], [2, 2], 6)] == [6, 3]


QUESTIONS = [("a" * 30, "b" * 20), ("a b " * 5, "c"), ("d", "e f"), ("g" * 9, "h" * 40)]


def stage_on(parent: Path, parent_id: str, folder: Path, precision: str) -> tuple[_Dpo, list[Preference]]:
    """The stage from a parent, and its pairs. folder: of its state and of the cache."""
    examples = [
        Preference(said("user", f"q{n}"), said("assistant", chosen), said("assistant", rejected))
        for n, (chosen, rejected) in enumerate(QUESTIONS)
    ]
    data = PreparedData("preference", examples, [], DataReport())
    settings = DpoSettings.model_validate({"kind": "dpo", "data": "x", "precision": precision})
    source = source_of(parent)
    inputs = Inputs(source, parent_id, data, [], None, None, 0, EvaluationSettings(), folder, folder / "cache")
    return _Dpo(settings, inputs, Desk.open(settings, source, None), Progress()), examples


def test_the_reference_starts_out_equal_in_bfloat16(tiny_llama: Path, tmp_path: Path) -> None:
    """What the stage keeps as the reference is nearer to the first training step than float32 arithmetic is."""
    stage, examples = stage_on(tiny_llama, "id", tmp_path, "bfloat16")
    model = stage.open(trainable=True)
    kept = stage.rows(model, examples, "training")
    sides = sides_of(kept)
    with torch.no_grad():
        exact = trained_logps(model, sides).sums()
        with autocast(model, "bfloat16"):
            policy = trained_logps(model, sides).sums()
    reference = torch.tensor([one.chosen for one in kept] + [one.rejected for one in kept])
    assert (policy - exact).abs().max() > 1e-2
    assert (policy - reference).abs().max() < 1e-4


def test_a_parent_that_was_trained_anew_is_another_reference(tiny_llama: Path, tmp_path: Path) -> None:
    """Two parents and one cache: each stage is held against the parent that it starts from, and finds it there again."""
    retrained = tmp_path / "retrained"
    model: Any = load_policy(source_of(tiny_llama), precision="float32")
    with torch.no_grad():
        model.lm_head.weight[:100] *= 3
    save_checkpoint(model, load_tokenizer(source_of(tiny_llama)), retrained)
    found = []
    for parent in (tiny_llama, retrained, tiny_llama):
        stage, examples = stage_on(parent, parent.name, tmp_path, "float32")
        model = stage.open(trainable=True)
        kept = stage.rows(model, examples, "training")
        found.append([one.chosen for one in kept] + [one.rejected for one in kept])
        assert found[-1] == pytest.approx(plain_logps(model, sides_of(kept)).tolist(), abs=1e-3)
    assert min(abs(old - new) for old, new in zip(*found[:2], strict=True)) > 0.1
    assert found[0] == found[2]
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2


def said(role: str, text: str) -> Messages:
    return (Message(role, text),)


def test_a_reward_model_with_another_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source_of(tiny_llama))
    save_checkpoint(load_reward(source_of(tiny_llama), trainable=True, precision="float32"), tokenizer, tmp_path)
    load_reward(source_of(tmp_path))
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AlignError, match="they do not belong together"):
        load_reward(source_of(tmp_path))
