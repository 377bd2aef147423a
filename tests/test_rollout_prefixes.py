"""Beginnings that prompts share are read once, and every row gets what it would get alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.rollout import refill
from align.rollout.generation import Sampling, generate
from align.rollout.prefixes import LEAST_TOKENS, shared_prefixes
from align.rollout.rows import Row

DRAW = random.Random(1)
ONE, OTHER = ([DRAW.randrange(3, 290) for _ in range(50)] for _ in range(2))
PROMPTS = [
    [*ONE, 5, 6], [*ONE, 9], [*OTHER, 8, 8, 8], [*ONE, 5, 7, 30, 31, 32], [*OTHER, 4], [11, 12, 13], ONE, ONE, [*ONE[:10], 3],
]  # fmt: skip
SAMPLINGS = {"greedy": Sampling(12), "sampled": Sampling(12, temperature=1.0, seed=3)}


def rows(prompts: list[list[int]]) -> list[Row]:
    return [Row(index, prompt, 10) for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    folder = request.getfixturevalue(f"tiny_{request.param}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)  # sharpened, so that no two tokens tie
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_beginnings_are_found_by_hand_worked_example() -> None:
    found = shared_prefixes(rows(PROMPTS))
    lengths = {index: len(prefix.ids) for index, prefix in found.items()}
    assert lengths == {0: 49, 1: 49, 2: 50, 3: 49, 4: 50, 6: 49, 7: 49}  # one token of ONE itself is left to be read
    assert found[0] is found[7]
    assert found[2].ids == OTHER


def test_short_beginnings_and_lone_prompts_are_left_alone() -> None:
    assert shared_prefixes(rows([[1] * (LEAST_TOKENS - 1) + [2], [1] * (LEAST_TOKENS - 1) + [3], [4] * 90])) == {}
    assert shared_prefixes([]) == {}


def test_a_long_beginning_is_not_cut_short_for_a_prompt_that_shares_little_of_it() -> None:
    long = [*ONE, *OTHER]
    found = shared_prefixes(rows([[*long, 5], [*long, 6], [*long, 7], [*ONE[:40], 200]]))
    assert {index: len(prefix.ids) for index, prefix in found.items()} == {0: 100, 1: 100, 2: 100}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=80), max_size=12))
def test_what_is_shared_begins_every_prompt_and_leaves_a_token(prompts: list[list[int]]) -> None:
    for index, prefix in shared_prefixes(rows(prompts)).items():
        assert LEAST_TOKENS <= len(prefix.ids) < len(prompts[index])
        assert prompts[index][: len(prefix.ids)] == list(prefix.ids)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_that_share_a_beginning_get_what_they_get_without_sharing(
    loaded: tuple[Any, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    shared = generate(model, tokenizer, PROMPTS, SAMPLINGS[name], stop_ids=[2, 40, 41])
    monkeypatch.setattr(refill, "shared_prefixes", lambda _: {})
    apart = generate(model, tokenizer, PROMPTS, SAMPLINGS[name], stop_ids=[2, 40, 41])
    assert [reply.ids for reply in shared] == [reply.ids for reply in apart]
    for one, other in zip(shared, apart, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_a_beginning_goes_through_the_model_once(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    prompts = [[*ONE, token] for token in range(3, 43)]
    generate(model, tokenizer, prompts, Sampling(1), stop_ids=[])
    hook.remove()
    assert sum(seen) == 50 + 40


def test_a_small_cache_reads_a_beginning_once_all_the_same(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    reads: list[Any] = []
    monkeypatch.setattr("align.rollout.generation.TOKENS_AT_ONCE", 4 * 80)
    whole = refill.RaggedCache.read_into
    monkeypatch.setattr(refill.RaggedCache, "read_into", lambda self, states: reads.append(1) or whole(self, states))
    generate(model, tokenizer, [[*ONE, token] for token in range(3, 23)], Sampling(8), stop_ids=[])
    assert len(reads) == 1


def test_the_order_of_prompts_is_kept(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    forwards = generate(model, tokenizer, PROMPTS, Sampling(6), stop_ids=[])
    backwards = generate(model, tokenizer, PROMPTS[::-1], Sampling(6), stop_ids=[])
    assert [reply.ids for reply in forwards] == [reply.ids for reply in backwards[::-1]]
