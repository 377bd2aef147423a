"""Bytes of weights, and of what an optimiser keeps beside them."""

from __future__ import annotations

from align.estimate.activations import FLOAT, HALF
from align.estimate.shape import Shape

NF4_BYTES = 0.516  # a weight in nf4 with double quantization: 4 bits and its share of the scales (Dettmers 2023, 3.1)
MOMENTS_BYTES = {"adamw": 2 * FLOAT, "adamw_8bit": 2}  # of a weight that trains, from the first optimiser step on
FUSED_BYTES = 2**31  # as models.fused has it


def frozen_bytes(shape: Shape, quantize: str | None, *, half: bool, head: bool = True) -> float:
    """Size of a model that does not train. head: of a language model, which a reward model lacks."""
    plain = HALF if half else FLOAT
    linear = {"nf4": NF4_BYTES, "int8": 1.0}.get(quantize or "", float(plain))
    weights = shape.parameters if head else shape.classifier_parameters
    return linear * shape.block_parameters + plain * (weights - shape.block_parameters)


def fused_bytes(shape: Shape, *, half: bool, adapted: bool, quantize: str | None) -> float:
    """Adapters and 4-bit weights laid out as plain matrices while a model writes; see models.fused."""
    size = FLOAT * shape.block_parameters
    layered = (adapted and quantize != "int8") or quantize == "nf4"
    return size if layered and not half and size <= FUSED_BYTES else 0.0
