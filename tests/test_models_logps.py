"""Log-probabilities of trained tokens without padding and without full logits, against the plain way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

from align.chat.encoded import Encoded
from align.models import logps
from align.models.loading import load_policy
from align.models.logps import is_lean, trained_logps
from align.models.source import source_of
from align.recipe.settings import AdapterSettings

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97),
    "gemma2": Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=4),
}


def row(ids: list[int], trained: list[int]) -> Encoded:
    return Encoded(ids, [at in trained for at in range(len(ids))])


ROWS = [
    row([5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]),
    row([12, 13], [1]),
    row([20, 21, 22, 23, 24], [0, 2, 4]),  # the first token has no log-probability
    row([30, 31, 32], []),
]


def plain(model: nn.Module, rows: list[Encoded]) -> torch.Tensor:
    """Row by row, written out."""
    found = []
    for one in rows:
        logits = model(input_ids=torch.tensor([one.ids])).logits[0].float().log_softmax(-1)
        found += [logits[at - 1, one.ids[at]] for at in range(1, len(one.ids)) if one.trained[at]]
    return torch.stack(found)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_lean_way_gives_what_rows_alone_give_and_the_same_gradients(name: str) -> None:
    model = model_of(name)
    assert is_lean(model)
    found = trained_logps(model, ROWS)
    expected = plain(model, ROWS)
    assert torch.allclose(found.logps, expected, atol=1e-5)
    assert found.row.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert torch.allclose(found.sums()[0], expected[:4].sum(), atol=1e-5)
    assert found.sums()[3] == 0
    gradients = []
    for values in (found.logps, expected):
        model.zero_grad()
        values.sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


def test_a_token_of_one_row_changes_no_other_row() -> None:
    model = model_of("llama")
    before = trained_logps(model, ROWS).sums()
    other = [row([50, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]), *ROWS[1:]]
    after = trained_logps(model, other).sums()
    assert before[0] != after[0]
    assert torch.equal(before[1:], after[1:])


def test_the_head_sees_only_what_predicts_a_trained_token() -> None:
    model, seen = model_of("llama"), []
    assert is_lean(model)
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    trained_logps(model, ROWS)
    assert sum(seen) == 7


def test_a_model_whose_logits_are_more_than_its_head_takes_the_plain_way() -> None:
    model = model_of("llama")
    model.forward = _doubled(model.forward)  # the logits of such a model are not its head on its last state
    assert not is_lean(model)
    expected = plain(model, ROWS)
    assert torch.allclose(trained_logps(model, ROWS).logps, expected, atol=1e-5)


def _doubled(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    return changed


def test_noise_on_embeddings_takes_the_plain_way() -> None:
    model = model_of("llama")
    assert is_lean(model)
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert not is_lean(model)


def test_finding_out_leaves_the_mode_of_training(tiny_llama: Path) -> None:
    model = load_policy(source_of(tiny_llama), adapter=AdapterSettings(rank=4), trainable=True, precision="float32")
    model.train()
    assert is_lean(model)
    assert model.training
    assert trained_logps(model, ROWS[:2]).logps.requires_grad


def test_it_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of("llama"), []
    monkeypatch.setattr(logps, "check_head", lambda _: calls.append(1))
    for _ in range(3):
        is_lean(model)
    assert len(calls) == 1
