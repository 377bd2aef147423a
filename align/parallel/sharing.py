"""How one training is shared: alone, with a whole model in each process (ddp), or with a part of it in each (fsdp).

The loop says what a step is; this says which rows of it are ours, and makes sums over rows those of all processes. An
objective calls trunk and head of a model as it likes, not its `forward`, and a process may have no rows at all: so
gradients are added up at the end of a step, rather than by the hooks of torch's DistributedDataParallel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from align.parallel.crew import Crew, Released, mustered
from align.parallel.shards import part_like, put_back, sharded, through, whole_state, whole_tensor
from align.parallel.shares import Groups, groups_of_all
from align.stopping import adopt_stop, stop_requested

T = TypeVar("T")
BUCKET = 2**24  # numbers that are added up at once; 64 MB in float32


class Sharing:
    """One process alone. The others refine it.

    model: what trains. leads: whether this process, number `rank`, measures and writes. scale: what a loss is multiplied
    by, since gradients may come back as a mean over processes. copies: whether `whole` and `optimizer_state` give what
    later steps do not change.
    """

    leads = True
    copies = False
    rank = 0
    scale = 1.0

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def told(self, state: Path | None) -> Path | None:
        """The saved state that the first process goes on from."""
        return state

    def groups(self, lengths: Sequence[int], group: Callable[[list[int]], Groups]) -> list[tuple[list[int], bool]]:
        """Our micro-batches of the rows of these lengths, and whether each counts or only keeps the others company."""
        return [(rows, True) for rows in group(list(lengths))]

    def through(self, work: Callable[[nn.Module], T]) -> T:
        """What `work` makes of the model."""
        return work(self.model)

    def summed(self, total: Tensor) -> Tensor:
        """A sum over our rows -> that over all rows."""
        return total

    def merged(self, sums: Counter[str]) -> Counter[str]:
        """As `summed`, by name."""
        return sums

    def add_gradients(self) -> None:
        """Gradients of our rows -> those of all rows."""

    def whole(self, weight: Tensor) -> Tensor:
        """A weight that may be in parts, as it is saved."""
        return weight

    def copy_into(self, weight: Tensor, saved: Tensor) -> None:
        """Puts a weight that was saved back into its place."""
        weight.copy_(saved)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a single process would save of its optimiser."""
        return optimizer.state_dict()

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Lays out the state that was just loaded as the weights are."""

    def stop_agreed(self) -> bool:
        """Whether any process was asked to stop: all of them stop then."""
        return bool(stop_requested())

    def finish(self) -> None:
        """Ends the training: the first process has the trained model, the others leave the stage with Released."""


class Replicas(Sharing):
    """Every process has the whole model; gradients are added up at the end of a step."""

    def __init__(self, model: nn.Module, crew: Crew) -> None:
        super().__init__(model)
        self.crew, self.leads, self.rank = crew, crew.leads, crew.rank
        for weight in _trained(model):
            crew.spread(weight.data)

    def told(self, state: Path | None) -> Path | None:
        return self.crew.told(state)

    def groups(self, lengths: Sequence[int], group: Callable[[list[int]], Groups]) -> list[tuple[list[int], bool]]:
        return [(rows, True) for rows in groups_of_all(lengths, self.crew.size, group)[self.crew.rank]]

    def summed(self, total: Tensor) -> Tensor:
        return self.crew.summed(total)

    def merged(self, sums: Counter[str]) -> Counter[str]:
        together: Counter[str] = Counter()
        for some in self.crew.gathered(sums):
            together.update(some)
        return together

    def add_gradients(self) -> None:
        weights = _trained(self.model)
        learnt = self.crew.summed(torch.tensor([int(weight.grad is not None) for weight in weights]))
        for bucket in _buckets([weight for weight, count in zip(weights, learnt.tolist(), strict=True) if count]):
            for weight in bucket:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            gradients = [weight.grad for weight in bucket if weight.grad is not None]
            flat = self.crew.summed(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, values in zip(gradients, torch.split(flat, [one.numel() for one in gradients]), strict=True):
                gradient.copy_(values.view_as(gradient))

    def stop_agreed(self) -> bool:
        number = self.crew.highest(stop_requested())
        if number:
            adopt_stop(number)
        return bool(number)

    def finish(self) -> None:
        if not self.leads:
            raise Released


class Shards(Replicas):
    """Every process keeps a part of each weight, its gradient and its optimiser state (FSDP2); layers are gathered as they
    are needed, by all processes at once: so all have the same number of micro-batches, with empty ones at the end."""

    copies = True

    def __init__(self, model: nn.Module, crew: Crew) -> None:
        super().__init__(model, crew)
        self.original = model
        self.scale = float(crew.size)
        self.model = sharded(model, crew.size)

    def groups(self, lengths: Sequence[int], group: Callable[[list[int]], Groups]) -> list[tuple[list[int], bool]]:
        found = groups_of_all(lengths, self.crew.size, group)
        ours = found[self.crew.rank]
        missing = max(map(len, found)) - len(ours)
        shortest = min(range(len(lengths)), key=lambda index: lengths[index])
        return [*((rows, True) for rows in ours), *[([shortest], False)] * missing]

    def through(self, work: Callable[[nn.Module], T]) -> T:
        return through(self.model, work)

    def add_gradients(self) -> None:
        """The backward pass has done it."""

    def whole(self, weight: Tensor) -> Tensor:
        found = whole_tensor(weight)
        return found.cpu() if self.leads else found.new_empty(0)

    def copy_into(self, weight: Tensor, saved: Tensor) -> None:
        weight.copy_(part_like(saved, weight))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return whole_state(optimizer)

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, state in optimizer.state.items():
            state.update({name: part_like(value, weight) for name, value in state.items()})

    def finish(self) -> None:
        put_back(self.model, self.original)
        super().finish()


def sharing_of(model: nn.Module) -> Sharing:
    """How the training of this model is shared; calls the other processes where they can join."""
    crew = mustered()
    if crew is None:
        return Sharing(model)
    return Shards(model, crew) if crew.strategy == "fsdp" else Replicas(model, crew)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The weights in order, in groups of one dtype and at most BUCKET numbers, or one weight."""
    bucket: list[nn.Parameter] = []
    for weight in weights:
        size = sum(one.numel() for one in bucket) + weight.numel()
        if bucket and (size > BUCKET or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket
