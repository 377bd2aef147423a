"""Rows without padding: the same hidden states and gradients as each row alone, on several architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.errors import AlignError
from align.models import plain_head
from align.models.head import check_head, target_logps
from align.models.loading import load_policy
from align.models.source import source_of
from align.models.trunk import attends_by_document, hidden_states, trunk_of

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral, window 8": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "gemma3, window 8": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16, "sliding_window": 8}),
    "gemma2, capped": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "sliding_window": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "cohere, scaled": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "granite, scaled": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
}
ROWS = [[5, 9, 4, 7, 11], list(range(3, 33)), [8], [7, 7, 3, 200, 150, 42, 17, 9, 4, 66, 12]]


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 300}
        return GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
    kind, config, extra = MODELS[name]
    return kind(config(**SHAPE, **extra))


@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_a_packed_row_equals_the_row_alone(name: str) -> None:
    model = model_of(name).eval()
    with torch.no_grad():
        together = hidden_states(model, ROWS)
        alone = [trunk_of(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral, window 8", "gemma3, window 8", "gpt2"])
def test_gradients_of_packed_rows_are_those_of_the_rows_alone(name: str) -> None:
    packed, alone = model_of(name), model_of(name)
    assert attends_by_document(packed)
    hidden_states(packed, ROWS).square().sum().backward()
    for row in ROWS:
        trunk_of(alone)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state.square().sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in trunk_of(m).parameters()]) for m in (packed, alone))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_a_token_changes_nothing_in_the_row_beside_it() -> None:
    model = model_of("llama").eval()
    with torch.no_grad():
        first = hidden_states(model, [[5, 9, 4], [7, 8, 9, 10]])
        second = hidden_states(model, [[5, 9, 200], [7, 8, 9, 10]])
    assert torch.equal(first[3:], second[3:])
    assert not torch.equal(first[:3], second[:3])


def test_checkpointing_activations_changes_no_gradient(tiny_llama: Path) -> None:
    grads = []
    for checkpointed in (False, True):
        model = load_policy(
            source_of(tiny_llama), trainable=True, precision="float32", gradient_checkpointing=checkpointed
        )
        hidden_states(model, ROWS).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in trunk_of(model).parameters()]))
    assert torch.allclose(*grads, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logps_are_those_of_the_whole_logits(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.models.head.LOGITS_AT_ONCE", 300 * 7)  # seven tokens at once
    model = model_of(name).eval()
    check_head(model)
    ids = torch.tensor([token for row in ROWS for token in row])
    with torch.no_grad():
        logps, entropies = target_logps(model, hidden_states(model, ROWS), ids, temperature=temperature, entropy=True)
        logits = torch.cat([model(torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]) / temperature
    known = logits.log_softmax(-1)
    assert (logps - known.gather(1, ids[:, None]).squeeze(1)).abs().max() < 1e-5
    assert (entropies + (known.exp() * known).sum(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("entropy", [False, True], ids=["by hand", "by autograd"])
def test_chunked_gradients_are_those_of_the_whole_logits(entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.linspace(-1, 1, 47)
    ids = torch.tensor([token for row in ROWS for token in row])
    grads = []
    for at_once, kept in ((300 * 7, 4 * 300 * 7), (2**23, 2**27)):
        monkeypatch.setattr("align.models.head.LOGITS_AT_ONCE", at_once)
        monkeypatch.setattr("align.models.head.LOGITS_KEPT_BYTES", kept)
        model = model_of("llama")
        logps, entropies = target_logps(model, hidden_states(model, ROWS), ids, temperature=0.7, entropy=entropy)
        (weights * logps + (0.1 * entropies if entropy else 0.0)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model = model_of("llama")
    known = (model.lm_head(hidden_states(model, ROWS)) / 0.7).log_softmax(-1)
    entropies = -(known.exp() * known).sum(-1)
    (weights * known.gather(1, ids[:, None]).squeeze(1) + (0.1 * entropies if entropy else 0.0)).sum().backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    for chunked in grads:
        assert (chunked - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("watched", [False, True], ids=["by hand", "by autograd"])
def test_above_the_bound_logits_of_all_tokens_never_exist_at_once(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.models.head.LOGITS_AT_ONCE", 300 * 4)
    monkeypatch.setattr("align.models.head.LOGITS_KEPT_BYTES", 4 * 300 * 4)
    model = model_of("llama")
    seen: list[int] = []
    if watched:
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    softmax = plain_head._softmax
    monkeypatch.setattr(
        plain_head, "_softmax", lambda logits, *a, **k: seen.append(len(logits)) or softmax(logits, *a, **k)
    )
    hidden = hidden_states(model, ROWS)
    logps, _ = target_logps(model, hidden, torch.tensor([token for row in ROWS for token in row]))
    logps.sum().backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * len(hidden)  # once forwards, once again backwards


def test_a_frozen_heads_logits_are_never_kept_nor_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.models.head.LOGITS_AT_ONCE", 300 * 4)
    monkeypatch.setattr("align.models.head.LOGITS_KEPT_BYTES", 0)
    model, grads, ids = model_of("llama"), [], torch.tensor([token for row in ROWS for token in row])
    model.lm_head.weight.requires_grad_(False)
    seen: list[int] = []
    softmax = plain_head._softmax
    monkeypatch.setattr(
        plain_head, "_softmax", lambda logits, *a, **k: seen.append(len(logits)) or softmax(logits, *a, **k)
    )
    for way in (lambda states: target_logps(model, states, ids)[0], lambda states: whole_logps(model, states, ids)):
        model.zero_grad()
        way(hidden_states(model, ROWS)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in trunk_of(model).parameters() if p.grad is not None]))
    assert sum(seen) == len(ids)
    assert max(seen) == 4
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()


def test_in_bfloat16_a_token_that_is_nearly_certain_keeps_its_gradient() -> None:
    """Its probability rounded to bfloat16 is 1, of which nothing would be left."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 50, bias=False)
    own = head.weight.detach()[7]
    state, target = (12.5 * own / own.norm() ** 2).requires_grad_(), torch.tensor([7])
    exact = (state[None] @ head.weight.t()).log_softmax(-1)[0, 7]
    by_state, by_weight = torch.autograd.grad(exact, [state, head.weight])
    missing = float(-torch.expm1(exact.detach()))
    assert 0 < missing < 2**-9
    with torch.autocast("cpu", torch.bfloat16):
        matrix = plain_head.compute_weight(head.weight)
        found = plain_head.PlainLogps.apply(state[None], head.weight, matrix, target, 1.0, None)
    ours = torch.autograd.grad(found.sum(), [state, head.weight])
    assert (ours[0] - by_state).norm() < 0.02 * by_state.norm()
    assert (ours[1] - by_weight).norm() < 0.02 * by_weight.norm()


def whole_logps(model: torch.nn.Module, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return model.lm_head(states).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


def test_a_head_that_does_more_is_refused() -> None:
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 3)
    scaled = model_of("llama")
    scaled.forward = lambda **inputs: type("Output", (), {"logits": model_of("llama")(**inputs).logits * 5})
    check_head(model)  # a hook belongs to the head
    with pytest.raises(AlignError, match="LlamaForCausalLM: its logits are not its head"):
        check_head(scaled)
