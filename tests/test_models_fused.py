"""Layers laid out as one matrix while a model decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from align.models import fused as module
from align.models.adapters import using
from align.models.fused import fused
from align.models.loading import load_policy
from align.models.source import source_of
from align.recipe.settings import AdapterSettings

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])


@pytest.fixture
def folder(tiny_llama: Path) -> Path:
    return tiny_llama


def adapted(folder: Path, quantize: str | None = None, **settings: object) -> nn.Module:
    adapter = AdapterSettings.model_validate({"rank": 4, **settings})
    model = load_policy(source_of(folder), quantize=quantize, adapter=adapter, trainable=True, precision="float32")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layered(model: nn.Module) -> int:
    return sum(isinstance(one, LoraLayer) for one in model.modules())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_one_matrix_gives_the_logits_of_the_layers(folder: Path, quantize: str | None) -> None:
    model = adapted(folder, quantize)
    before, layers = logits(model), layered(model)
    assert layers
    with fused(model):
        assert layered(model) == 0
        inside = logits(model)
    assert torch.allclose(inside, before, atol=2e-5)
    assert layered(model) == layers
    assert torch.equal(logits(model), before)


def test_the_adapter_counts(folder: Path) -> None:
    model = adapted(folder)
    with fused(model):
        inside = logits(model)
    with model.disable_adapter(), fused(model):  # type: ignore[operator]
        without = logits(model)
    plain = logits(load_policy(source_of(folder), precision="float32"))
    assert torch.allclose(without, plain, atol=2e-5)
    assert not torch.allclose(inside, plain, atol=1e-3)


def test_the_adapter_that_is_active_is_the_one_that_counts(folder: Path) -> None:
    model = adapted(folder)
    model.add_adapter("other", model.peft_config["default"])  # type: ignore[operator, index, union-attr]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.other" in name:
                weight.normal_(0, 0.3)
    with using(model, "other"):
        expected = logits(model)
        with fused(model):
            assert torch.allclose(logits(model), expected, atol=2e-5)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


def test_layers_come_back_when_something_fails(folder: Path) -> None:
    model = adapted(folder)
    layers = layered(model)
    with pytest.raises(ZeroDivisionError), fused(model):
        raise ZeroDivisionError
    assert layered(model) == layers


@pytest.mark.parametrize("settings", [{"dora": True}], ids=["dora"])
def test_what_is_no_plain_sum_is_left_as_it_is(folder: Path, settings: dict[str, object]) -> None:
    model = adapted(folder, **settings)
    layers = layered(model)
    with fused(model):
        assert layered(model) == layers


def test_bfloat16_and_int8_are_left_as_they_are(folder: Path) -> None:
    half = load_policy(source_of(folder), adapter=AdapterSettings(rank=4), trainable=True, precision="bfloat16")
    eighth = adapted(folder, "int8")
    for model in (half, eighth):
        layers = layered(model)
        with fused(model):
            assert layered(model) == layers


def test_matrices_beyond_the_bound_are_not_laid_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FUSED_BYTES", 1000)
    model = adapted(folder)
    layers = layered(model)
    with fused(model):
        assert layered(model) == layers


def test_training_goes_on_after_it(folder: Path) -> None:
    model = adapted(folder)
    with fused(model):
        logits(model)
    model(input_ids=IDS).logits.sum().backward()
    grads = [weight.grad for name, weight in model.named_parameters() if "lora_A" in name]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
