"""Adapters and quantized weights as plain matrices for a while: what decodes token by token would else put them together
anew at every token.

Only where the arithmetic is float32, since a sum rounded to bfloat16 would lose what a small update says, and only while
the matrices fit into FUSED_BYTES. Left as they are: int8 bases, whose activations are rounded too, and DoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from align.models.quantized import dequantized

FUSED_BYTES = 2**31


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """In this block each layer with an adapter or a 4-bit weight is one matrix, of the adapters that are active now.

    For forward passes without gradients. The values agree with those of the layers to float32's rounding.
    """
    layers = [(name, module) for name, module in model.named_modules() if _is_layered(module)]
    outermost = [(name, module) for name, module in layers if not any(_inside(name, other) for other, _ in layers)]
    size = sum(4 * module.in_features * module.out_features for _, module in outermost)
    if size > FUSED_BYTES or not outermost or not all(_is_fusable(module) for _, module in outermost):
        yield
        return
    places = [(*_place(model, name), module) for name, module in outermost]
    try:
        for parent, name, module in places:
            setattr(parent, name, _plain(module))
        yield
    finally:
        for parent, name, module in places:
            setattr(parent, name, module)


def _is_layered(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer | bnb.nn.Linear4bit)


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    above, _, last = name.rpartition(".")
    return model.get_submodule(above), last


def _is_fusable(module: nn.Module) -> bool:
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, bnb.nn.Linear4bit):
        plain = base.compute_dtype == torch.float32 and base.weight.quant_state is not None
    else:
        plain = type(base) is nn.Linear and base.weight.dtype == torch.float32
    if not isinstance(module, LoraLayer):
        return plain
    layer: Any = module
    return plain and not layer.merged and not any(name in layer.lora_variant for name in layer.active_adapters)


@torch.no_grad()
def _plain(module: nn.Module) -> nn.Linear:
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    weight: Tensor = dequantized(base).float() if isinstance(base, bnb.nn.Linear4bit) else base.weight
    layer: Any = module
    if isinstance(module, LoraLayer) and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name)
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = base.bias
    return plain.eval()
