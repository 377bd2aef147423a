"""A model in parts, one in each process (FSDP2, torch's `fully_shard`), and back again.

`fully_shard` changes the modules that it is given for good, so it gets a copy of them; the model itself only lends its
weights and gets the trained ones back. Between trainings every process has the whole model, to measure and to save it as
ever: what FSDP saves is gradients, optimiser state and all but one layer's weights while training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from align.errors import AlignError
from align.models.logps import is_padded
from align.models.trunk import inner_model

T = TypeVar("T")
METHOD = "through"  # of a model in parts: the way in for all that is not its `forward`


def sharded(model: nn.Module, processes: int) -> nn.Module:
    """A copy in parts; the model itself holds nothing until `put_back`. Raises AlignError for a quantized model."""
    weights = list(model.parameters())
    if any(not weight.is_floating_point() for weight in weights):
        raise AlignError(
            "a quantized base cannot be shared out by strategy: fsdp", "Use strategy: ddp; in 4 bits the base is small."
        )
    parts = copy.deepcopy(model, {id(weight): weight for weight in weights})
    is_padded(parts)  # found out for each model once, by running it: only now can it be run as it is
    mesh = init_device_mesh(weights[0].device.type, (processes,))
    for layer in _layers(parts):
        fully_shard(layer, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    setattr(parts, METHOD, MethodType(lambda self, work: work(self), parts))
    register_fsdp_forward_method(cast(Any, parts), METHOD)
    for weight in weights:
        weight.data = weight.data.new_empty(0)
    return parts


def through(parts: nn.Module, work: Callable[[nn.Module], T]) -> T:
    """What `work` makes of a model in parts, gathered as in its forward pass. All processes call this together."""
    return cast(T, getattr(parts, METHOD)(work))


def put_back(parts: nn.Module, model: nn.Module) -> None:
    """The weights of a model in parts, gathered into the model that they were taken from."""
    with torch.no_grad():
        for part, weight in zip(parts.parameters(), model.parameters(), strict=True):
            weight.data = whole_tensor(part.detach())
            part.grad = None


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be in parts, gathered. All processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state as a single process would save it, on the CPU. All processes call this together."""
    return cast(dict[str, Any], tree_map(_gathered, optimizer.state_dict()))


def _gathered(value: Any) -> Any:
    if isinstance(value, DTensor):
        return whole_tensor(value).cpu()
    return value.clone() if isinstance(value, Tensor) else value  # a count of steps, which goes on


def part_like(value: Any, weight: Tensor) -> Any:
    """The part of a whole tensor that lies here, cut as the weight is that it belongs to; anything else as it is."""
    whole = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == weight.shape
    if not whole or not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers says belong together."""
    names = getattr(inner_model(model), "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]
