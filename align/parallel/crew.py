"""The processes that work on one run together: which of them this is, and what they tell each other.

The first one leads: it plans, keeps the registry, measures and writes, as a single process would. The others wait, and join
it in each training. What starts them (`align run --processes`, torchrun, srun) says so in the environment, as torchrun
does. That is read once and then hidden, and each process sees one accelerator at most: transformers, accelerate and all the
rest work as in a single process, and only what stands in this package knows of others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from align.errors import AlignError, StageFailed

if TYPE_CHECKING:
    from torch import Tensor

Strategy = Literal["ddp", "fsdp"]
T = TypeVar("T")

MEETING = "ALIGN_MEETING"  # where our own processes meet, as torch.distributed's init_method
PATIENCE = timedelta(days=30)  # others wait while the first one measures; whoever started us ends us when one is gone
OTHERS = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "ACCELERATE_", "FSDP_")  # beginnings of what else says so
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

_crew: Crew | None = None
_job: Any = None


class CrewLost(StageFailed):
    """Another process of the run is gone."""


class Released(Exception):
    """A process that does not lead has done its part of a stage."""


class Crew:
    """size processes, of which this is number `rank`. strategy: each has the whole model (ddp), or a part of it (fsdp).

    here: of the processes, those on this machine.
    """

    def __init__(self, rank: int, size: int, strategy: Strategy = "ddp", here: int | None = None) -> None:
        self.rank, self.size, self.strategy, self.here = rank, size, strategy, here or size

    @property
    def leads(self) -> bool:
        """Whether this is the process that plans, measures and writes."""
        return self.rank == 0

    def meet(self, strategy: Strategy) -> None:
        """Waits until all are there; the first one's strategy is that of all. Raises AlignError where only some have a GPU."""
        import torch
        from torch import distributed

        accelerated = torch.cuda.is_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if accelerated else "gloo",
            init_method=os.environ.pop(MEETING, "env://"), rank=self.rank, world_size=self.size, timeout=PATIENCE,
        )  # fmt: skip
        self.strategy = self.told(self.strategy if self.strategy == "fsdp" else strategy)
        found = self.gathered(accelerated)
        if len(set(found)) > 1:
            without = [rank for rank, has in enumerate(found) if not has]
            raise AlignError(f"processes {without} of {self.size} see no GPU, and the others do", "One GPU a process.")

    def told(self, value: T) -> T:
        """What the first process has to say."""
        from torch import device, distributed

        box = [value]
        with _company():
            distributed.broadcast_object_list(box, src=0, device=device("cpu"))
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """What each process has to say."""
        from torch import distributed

        found: list[Any] = [None] * self.size
        with _company():
            distributed.all_gather_object(found, value)
        return found

    def spread(self, tensor: Tensor) -> None:
        """The first process's values become everybody's, in place."""
        from torch import distributed

        with _company():
            distributed.broadcast(tensor, src=0)

    def summed(self, tensor: Tensor) -> Tensor:
        """The tensor with those of all others added to it, in place."""
        from torch import distributed

        with _company():
            distributed.all_reduce(tensor)
        return tensor

    def highest(self, number: int) -> int:
        """The highest of everybody's numbers."""
        from torch import distributed, tensor

        found = tensor(number)
        with _company():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def dismiss(self) -> None:
        """Sends the others home."""
        from torch import distributed

        self.told(None)
        distributed.destroy_process_group()


def crew() -> Crew | None:
    """The crew that this process belongs to; None: it is alone. Called before torch looks for accelerators.

    Raises AlignError under a launcher whose way of sharing a model is not ours.
    """
    global _crew
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if _crew is None and size > 1 and "RANK" in os.environ:
        if _says_yes("ACCELERATE_USE_DEEPSPEED"):
            raise AlignError(
                "this was started under DeepSpeed, which align does not use",
                "Start it without, and set `launch: {strategy: fsdp}`: optimiser, gradients and weights are shared as well.",
            )
        rank = int(os.environ["RANK"])
        _see_one_accelerator(int(os.environ.get("LOCAL_RANK") or rank))
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
        _crew = Crew(rank, size, "fsdp" if _says_yes("ACCELERATE_USE_FSDP") else "ddp", here)
        for name in [name for name in os.environ if name in PLACES or name.startswith(OTHERS)]:
            del os.environ[name]
    return _crew


@contextmanager
def announced(job: Any) -> Iterator[None]:
    """In this block the others can be called to join in: `job` is what they are told."""
    global _job
    _job = job
    try:
        yield
    finally:
        _job = None


def mustered() -> Crew | None:
    """The crew that trains, called together; None: this process trains alone, since nothing was announced."""
    if _crew is None or _job is None:
        return None
    if _crew.leads:
        _crew.told(_job)
    return _crew


def jobs(member: Crew) -> Iterator[Any]:
    """What the first process calls the others to, until it sends them home."""
    while (job := member.told(None)) is not None:
        with announced(job):
            yield job


@contextmanager
def _company() -> Iterator[None]:
    """A connection that breaks, as our error."""
    try:
        yield
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        raise CrewLost(f"another process of this run is gone ({first})") from error


def _see_one_accelerator(number: int) -> None:
    """number: of this process on its machine. Where it was given a single one already, that is it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif len(visible) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else ""


def _says_yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
