"""Frozen bases in 4 bits (nf4, double quantization) or 8 (int8). The only importer of bitsandbytes.

Two faults of bitsandbytes 0.50 on CPUs are mended right after loading, before any forward pass:
* `Linear4bit` repacks its weights in place at the first forward in eval mode on AVX-512-bf16 processors, after which
  gradients, dequantization and merges are garbage, and widths that are no multiple of 64 crash;
* `Linear8bitLt` rounds activations to 8 bits in eval mode but not while it trains, so a model would be evaluated as
  another one than was trained; and it loses its scale under DoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from align.models.source import Quantize


class _SteadyLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """Takes its training path always: exact activations, in training and evaluation alike."""

    def train(self, mode: bool = True) -> _SteadyLinear8bit:
        super().train(True)
        return self

    def init_8bit_state(self) -> None:
        """Keeps the scale that it has when peft (DoRA) moved the weight, which loses it there."""
        if self.weight.SCB is not None:
            super().init_8bit_state()


def quantization_config(quantize: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers quantizes while it loads; activations and dequantized weights have `dtype`."""
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def mend_for_cpu(model: nn.Module) -> None:
    """Makes a freshly loaded quantized model compute the same in training and evaluation; see the top of this file."""
    for _, module in _quantized_modules(model):
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif module.weight.device.type == "cpu":
            module.__class__ = _SteadyLinear8bit
            module.train()


def dequantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a quantized model computes with, by module name, (out, in) each, in the dtype it dequantizes to."""
    return {name: dequantized(module) for name, module in _quantized_modules(model)}


def _quantized_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield name, module


def dequantized(module: Any) -> Tensor:
    """The weight (out, in) that a quantized layer computes with."""
    if isinstance(module, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return weight
    scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    rows: Tensor = bnb.functional.int8_vectorwise_dequant(module.weight.data, scale)
    return rows
