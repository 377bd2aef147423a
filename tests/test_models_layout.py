"""Beginnings that rows share: found, laid out once, and exact in states and gradients on several architectures."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from align.chat.encoded import Encoded
from align.models.layout import Layout, shared_beginnings
from align.models.logps import trained_logps
from align.models.trunk import document_attention, hidden_states, trunk_of
from tests.test_models_trunk import MODELS, model_of

PROMPT = list(range(40, 60))
OTHER = list(range(100, 109))
ROWS = [
    [*PROMPT, 5, 9, 4, 7, 11],
    [8],
    [*OTHER, 7, 7, 3],
    [*PROMPT, 5, 6, 12, *range(200, 220)],
    PROMPT[:],  # another row's beginning, whole
    [*OTHER, 1],
    [*PROMPT, 5, 9, 4, 7, 11],  # a row once more
    list(range(3, 33)),
]
EXACT = [name for name in MODELS if name != "gemma2, capped"] + ["gpt2"]  # the others are padded, and share nothing


def test_each_beginning_lies_once_and_every_token_is_found_again() -> None:
    layout = Layout.of(ROWS)
    tokens = [token for row in ROWS for token in row]
    places = [place for row in ROWS for place in range(len(row))]
    assert layout.shares
    assert len(layout.ids) == len(tokens) - 3 * len(PROMPT) - len(OTHER) == sum(layout.lengths)
    assert [layout.ids[at] for at in layout.places] == tokens
    assert [layout.positions[at] for at in layout.places] == places


def test_a_layout_is_any_rows_again_however_they_begin() -> None:
    draw = random.Random(0)
    for _ in range(200):
        rows = [[draw.choice((1, 1, 1, 2)) for _ in range(draw.randint(1, 20))] for _ in range(draw.randint(1, 8))]
        layout = Layout.of(rows, least=2)
        assert [layout.ids[at] for at in layout.places] == [token for row in rows for token in row]
        assert len(layout.ids) <= len(layout.places)
        assert sum(layout.lengths) == len(layout.ids)
        if not layout.shares:
            assert layout.ids == [token for row in rows for token in row]


def test_the_order_of_the_rows_does_not_matter_for_what_is_shared() -> None:
    layouts = [Layout.of([ROWS[at] for at in order]) for order in ([0, 3, 1, 2, 5, 7], [7, 3, 2, 1, 0, 5])]
    assert len({len(layout.ids) for layout in layouts}) == 1


def test_pairs_keep_their_prompts_though_all_rows_begin_with_the_same_few_words() -> None:
    every = list(range(10))
    pairs = [[*every, *range(20 * pair, 20 * pair + 15), pair, side] for pair in range(1, 4) for side in (0, 1)]
    assert shared_beginnings(pairs) == [([0, 1], 26), ([2, 3], 26), ([4, 5], 26)]
    assert shared_beginnings([[*every, 1, 2], [*every, 3, 4], [*every, 5, 6]]) == [([0, 1, 2], 10)]


def test_a_beginning_that_saves_too_little_is_not_set_apart() -> None:
    assert not Layout.of([[*range(7), 50, 51], [*range(7), 60]]).shares
    long = [[*range(8), *range(100 * n, 100 * n + 90)] for n in (1, 2)]
    assert not Layout.of(long).shares  # its attention would cost more than the eight tokens


@pytest.mark.parametrize("name", EXACT)
def test_states_behind_a_shared_beginning_are_those_of_the_rows_alone(name: str) -> None:
    model = model_of(name).eval()
    with torch.no_grad():
        together = hidden_states(model, ROWS)
        alone = [trunk_of(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_gradients_through_a_shared_beginning_are_the_sum_over_its_rows(name: str) -> None:
    shared, alone = model_of(name), model_of(name)
    torch.manual_seed(1)
    weights = torch.randn(sum(map(len, ROWS)), 64)
    (hidden_states(shared, ROWS) * weights).sum().backward()
    for row, weight in zip(ROWS, weights.split([len(row) for row in ROWS]), strict=True):
        states = trunk_of(alone)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
        (states * weight).sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in trunk_of(m).parameters()]) for m in (shared, alone))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_states_at_some_places_are_those_of_all() -> None:
    model = model_of("llama").eval()
    at = torch.tensor([0, 19, 20, 24, 30, 61, 19])
    with torch.no_grad():
        assert torch.equal(hidden_states(model, ROWS, at), hidden_states(model, ROWS)[at])


def test_checkpointed_layers_share_the_beginning_again_in_the_backward_pass() -> None:
    grads = []
    for checkpointed in (False, True):
        model = model_of("mistral, window 8").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden_states(model, ROWS).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in trunk_of(model).parameters()]))
    assert torch.allclose(*grads, atol=1e-5)


def test_trained_tokens_of_a_shared_prompt_count_for_both_rows() -> None:
    model = model_of("qwen3").eval()
    rows = [Encoded([*PROMPT, 5, 9], [True] * 22), Encoded([*PROMPT, 5, 6, 12], [True] * 23)]
    together, alone = trained_logps(model, rows), [trained_logps(model, [row]) for row in rows]
    assert together.row.tolist() == [0] * 21 + [1] * 22
    assert torch.allclose(together.logps, torch.cat([one.logps for one in alone]), atol=1e-5)
    grads = []
    for values in ([together], alone):
        model.zero_grad()
        sum(one.logps.sum() for one in values).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()


def test_where_rows_are_padded_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "of", lambda *_: pytest.fail("laid out"))
    model = model_of("gemma2, capped").eval()
    with torch.no_grad():
        assert len(hidden_states(model, ROWS)) == sum(map(len, ROWS))


def test_a_branch_does_not_see_the_branch_before_it() -> None:
    model = model_of("llama").eval()
    with torch.no_grad():
        before = hidden_states(model, [[*PROMPT, 5, 9], [*PROMPT, 6]])
        after = hidden_states(model, [[*PROMPT, 200, 150], [*PROMPT, 6]])
    assert torch.equal(before[22:], after[22:])
    assert not torch.equal(before[20:22], after[20:22])


def test_attention_in_bfloat16_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(q.dtype) or real(q, *a, **k))
    layout = Layout.of(ROWS)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(layout.ids), 16).bfloat16() for heads in (4, 2, 2))
    found, _ = document_attention(torch.nn.Identity(), q, k, v, None, layout)
    exact, _ = document_attention(torch.nn.Identity(), q.float(), k.float(), v.float(), None, layout)
    assert set(seen) == {torch.float32}
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
