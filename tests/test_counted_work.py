"""How many tokens go through trunk and head, and how often: counted by hooks, since wall time says little in a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from align.batches import micro_batches
from align.chat.encoded import Encoded, EncodedPair
from align.memory import Budget
from align.models.logps import is_lean, is_padded
from align.models.trunk import attends_by_document, trunk_of
from align.progress import Progress
from align.recipe.settings import KtoLoss, SftSettings, SigmoidLoss
from align.rollout.scoring import answer_logps, pair_logps, pair_rewards
from align.stages.objectives import AnswerLoss, ComparedPair, PreferenceLoss, RatedLoss, RatedRow, RewardLoss
from align.trainer import Task, train

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 97, "pad_token_id": 0,
}  # fmt: skip


def row(prompt: Sequence[int], reply: Sequence[int]) -> Encoded:
    return Encoded([*prompt, *reply], [False] * len(prompt) + [True] * len(reply))


def pair(start: int, prompt: int, chosen: int, rejected: int) -> EncodedPair:
    ids = [(start + 7 * place) % 90 + 1 for place in range(prompt)]
    return EncodedPair(row(ids, [91] * chosen), row(ids, [92] * rejected), prompt, None, None)


ROWS = [row(range(1, 12), [5, 6, 7]), row([20], [21] * 40), row([30, 31, 32], [33]), row(range(40, 60), [8] * 9)]
PAIRS = [pair(1, 30, 5, 9), pair(2, 12, 20, 3), pair(5, 24, 1, 1)]
PROMPTS, REPLIES = 30 + 12 + 24, 14 + 23 + 2
REAL = sum(len(one.ids) for one in ROWS)


@pytest.fixture
def policy() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG))
    assert is_lean(model)  # found out once, by a look at three tokens
    return model


@pytest.fixture
def ranker() -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(LlamaConfig(**CONFIG, num_labels=1))


class Counted:
    """Tokens of each call of a module."""

    def __init__(self, module: nn.Module, size: Callable[[Any], int]) -> None:
        self.calls: list[int] = []
        module.register_forward_hook(lambda _, __, output: self.calls.append(size(output)))


def through_trunk(model: nn.Module) -> Counted:
    return Counted(trunk_of(model), lambda output: output.last_hidden_state[..., 0].numel())


def through_head(head: nn.Module) -> Counted:
    return Counted(head, lambda output: output[..., 0].numel())


def test_a_pairs_prompt_goes_through_once_with_both_replies(policy: Any, ranker: Any) -> None:
    trunk, head = through_trunk(policy), through_head(policy.lm_head)
    loss, _ = PreferenceLoss(SigmoidLoss(), beta=0.1)(policy, [ComparedPair(one, -1.0, -1.0) for one in PAIRS])
    loss.backward()
    assert trunk.calls == [PROMPTS + REPLIES]
    assert sum(head.calls) == REPLIES
    trunk, head = through_trunk(ranker), through_head(ranker.score)
    RewardLoss(centering=0.0)(ranker, PAIRS)[0].backward()
    assert trunk.calls == [PROMPTS + REPLIES]
    assert head.calls == [2 * len(PAIRS)]


def test_scoring_pairs_reads_each_prompt_once(policy: Any, ranker: Any) -> None:
    trunk = through_trunk(policy)
    pair_logps(policy, PAIRS)
    assert trunk.calls == [PROMPTS + REPLIES]
    trunk = through_trunk(ranker)
    pair_rewards(ranker, PAIRS)
    assert trunk.calls == [PROMPTS + REPLIES]


def test_a_pairs_sides_stay_together_when_scoring_takes_many_passes(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = pair_logps(policy, PAIRS)
    monkeypatch.setattr("align.rollout.scoring.TOKENS_AT_ONCE", 97)
    trunk = through_trunk(policy)
    cut = pair_logps(policy, PAIRS)
    assert sorted(trunk.calls) == [44, 35 + 26]
    assert torch.allclose(torch.cat(cut.logps), torch.cat(together.logps), atol=1e-5)


def test_an_answers_step_sees_the_real_tokens_and_the_head_the_trained_ones(policy: Any) -> None:
    trunk, head = through_trunk(policy), through_head(policy.lm_head)
    AnswerLoss()(policy, ROWS)[0].backward()
    assert trunk.calls == [REAL]
    assert sum(head.calls) == 3 + 40 + 1 + 9
    answer_logps(policy, ROWS)
    assert trunk.calls == [REAL] * 2


def test_ratings_of_one_prompt_read_it_once(policy: Any) -> None:
    prompt = list(range(1, 21))
    replies = [row(prompt, [60 + n] * 4) for n in range(3)]
    rated = [RatedRow(one, True, -1.0, other, -1.0) for one, other in zip(replies, reversed(replies), strict=True)]
    objective = RatedLoss(KtoLoss(kind="kto"), beta=0.1, budget=Budget(1000))
    trunk = through_trunk(policy)
    objective(policy, objective.prepared(policy, rated))[0].backward()
    assert trunk.calls == [20 + 12] * 2  # once for the baseline, once for the loss


@pytest.mark.parametrize(("budget", "calls"), [(1000, [REAL]), (REAL, [REAL]), (60, [55, 33])])
def test_a_step_takes_as_few_passes_as_its_real_tokens_need(
    policy: Any, budget: int, calls: list[int], tmp_path: Path
) -> None:
    settings = SftSettings(
        kind="sft", data="rows", learning_rate=1e-3, batch_size=4, batch_tokens=budget, precision="float32", max_steps=1
    )
    trunk = through_trunk(policy)
    train(Task(policy, AnswerLoss(), ROWS, [], settings, seed=0, state=tmp_path / "state"), Progress())
    assert sum(trunk.calls) == REAL
    assert len(trunk.calls) == len(calls)
    assert max(trunk.calls) <= max(budget, 41)


def test_which_models_cost_their_padding(policy: Any, ranker: Any) -> None:
    assert not is_padded(policy)
    assert not is_padded(ranker)
    assert not is_padded(Held(policy))
    policy.get_input_embeddings().neftune_noise_alpha = 5.0
    assert is_padded(policy)
    capped = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG, attn_logit_softcapping=30.0))
    assert not attends_by_document(capped)
    assert is_padded(capped)
    assert micro_batches([5, 50], 60, padded=is_padded(capped)) == [[1], [0]]


class Held(nn.Module):
    """A module that trains a policy, as the roles of ppo do."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
