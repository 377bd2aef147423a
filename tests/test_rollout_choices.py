"""Log-probabilities of given next tokens, with and without beginnings that prompts share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from align.models.loading import load_policy
from align.models.source import source_of
from align.rollout import choices
from align.rollout.choices import choice_logps

DRAW = random.Random(2)
COMMON = [DRAW.randrange(3, 290) for _ in range(60)]
SHARING = [[*COMMON, *(DRAW.randrange(3, 290) for _ in range(n))] for n in (1, 4, 9, 2)]
APART = [[DRAW.randrange(3, 290) for _ in range(n)] for n in (5, 30, 12)]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    return load_policy(source_of(folder), precision="float32")


def plain(model: Any, prompts: list[list[int]], tokens: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
    return torch.stack([row[torch.tensor(wanted)] for row, wanted in zip(rows, tokens, strict=True)])


@pytest.mark.parametrize("prompts", [SHARING, APART, SHARING + APART], ids=["sharing", "apart", "both"])
def test_they_are_those_of_a_plain_forward(model: Any, prompts: list[list[int]]) -> None:
    tokens = [[7 + number, 99] for number in range(len(prompts))]
    assert torch.allclose(choice_logps(model, prompts, tokens), plain(model, prompts, tokens), atol=1e-4)


def test_a_common_beginning_is_read_once_and_nothing_is_decoded(model: Any) -> None:
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    choice_logps(model, [[*COMMON, token] for token in range(3, 33)], [[5, 6]] * 30)
    hook.remove()
    assert sum(seen) == 60 + 30


def test_little_in_common_takes_the_way_without_padding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.refill, "decode", None)
    choice_logps(model, APART, [[5, 6]] * 3)


def test_no_prompts_give_no_rows(model: Any) -> None:
    assert len(choice_logps(model, [], [])) == 0
