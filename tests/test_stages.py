"""What stages ask of a model: losses that no split of a step changes, and a reference in the arithmetic of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.chat.encoded import Encoded, EncodedPair
from align.data.examples import Message, Messages, Preference
from align.data.prepared import DataReport, PreparedData
from align.errors import AlignError
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.logps import trained_logps
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.progress import Progress
from align.recipe.settings import DpoSettings, EvaluationSettings, SigmoidLoss
from align.stages.dpo import _Dpo
from align.stages.encoding import Desk
from align.stages.objectives import ComparedPair, PreferenceLoss
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


def test_kto_puts_replies_to_prompts_that_ask_something_else() -> None:
    rows = [row(10, 11, 1), row(10, 11, 2), row(20, 21, 3), row(20, 21, 4), row(10, 11, 5)]
    mismatched = rotated(rows, [2] * 5, 8)
    assert [one.ids for one in mismatched] == [[10, 11, 3], [10, 11, 3], [20, 21, 5], [20, 21, 5], [10, 11, 3]]
    assert [one.ids[2] for one in rotated(rows[:2], [2, 2], 8)] == [2, 1]
    assert [len(one.ids) for one in rotated([row(1, 2, 3), row(4, 5, *range(9))], [2, 2], 6)] == [6, 3]


def test_the_reference_starts_out_equal_in_bfloat16(tiny_llama: Path, tmp_path: Path) -> None:
    """What the stage keeps as the reference is nearer to the first training step than float32 arithmetic is."""
    questions = [
        Preference(said("user", f"q{n}"), said("assistant", "a" * 30), said("assistant", "b" * 20)) for n in range(4)
    ]
    data = PreparedData("preference", questions, [], DataReport())
    settings = DpoSettings.model_validate({"kind": "dpo", "data": "x", "precision": "bfloat16"})
    parent = source_of(tiny_llama)
    inputs = Inputs(parent, "id", data, [], None, None, 0, EvaluationSettings(), tmp_path, tmp_path / "cache")
    stage = _Dpo(settings, inputs, Desk.open(settings, parent, None), Progress())
    model = stage.open(trainable=True)
    kept = stage.rows(model, questions, "training")
    sides = [one.pair.chosen for one in kept]
    with torch.no_grad():
        exact = trained_logps(model, sides).sums()
        with autocast(model, "bfloat16"):
            policy = trained_logps(model, sides).sums()
    reference = torch.tensor([one.chosen for one in kept])
    assert (policy - exact).abs().max() > 1e-2
    assert (policy - reference).abs().max() < 1e-4


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
