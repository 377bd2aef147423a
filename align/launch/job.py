"""A stage that several processes train: what the first one tells the others of it, and how they join in."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.prepared import DataReport, PreparedData, read_prepared
from align.errors import AlignError
from align.models.source import source_of
from align.parallel.crew import Released, announced, crew
from align.progress import Progress
from align.recipe.graph import adapter_stage
from align.recipe.settings import LaunchSettings, TrainingSettings

if TYPE_CHECKING:
    from align.origins import Workshop
    from align.stages.stage import Inputs

SEVERAL = ("pretrain", "sft", "reward", "dpo")  # kinds of stages that can use several processes


@dataclass(frozen=True)
class Job:
    """module: whose `run` makes the stage. inputs: without data, which lies in the folder `data`, and what is measured."""

    module: str
    settings: TrainingSettings
    inputs: Inputs
    data: Path


@contextmanager
def shared(workshop: Workshop, name: str, module: str, inputs: Inputs, progress: Progress) -> Iterator[None]:
    """In this block other processes of the run, if there are any, can be called to join in the stage's training."""
    ours, settings = crew(), workshop.stage(name)
    if ours is None:
        yield
    elif settings.kind not in SEVERAL or not isinstance(settings, TrainingSettings):
        progress.note(f"{workshop.full_name(name)}: on one process; {settings.kind} cannot use several yet")
        yield
    else:
        progress.note(f"{workshop.full_name(name)}: trains on {ours.size} processes ({ours.strategy})")
        bare = PreparedData("none", [], [], DataReport())
        told = replace(inputs, data=bare, questions=(), judge=None, log_to=())
        with announced(Job(module, settings, told, workshop.data(settings.data)[0].path)):
            yield


def join(job: Job) -> None:
    """Our part of a stage: everything up to the end of its training."""
    merged = job.inputs.work / "merged"  # what a reward model starts from, where that is a policy's adapter
    parent = source_of(merged) if merged.is_dir() else job.inputs.parent
    with tempfile.TemporaryDirectory(prefix="align-join-") as scratch:
        inputs = replace(job.inputs, parent=parent, data=read_prepared(job.data), work=Path(scratch) / "state")
        with suppress(Released):
            import_module(job.module).run(job.settings, inputs, Path(scratch) / "artifact", Progress())
    gc.collect()  # the model, before the next one is loaded


def launched() -> dict[str, Any]:
    """What a run records of its processes; {} where there is one."""
    ours = crew()
    return {"launch": {"processes": ours.size, "strategy": ours.strategy}} if ours else {}


def check_launch(workshop: Workshop, going: Sequence[str]) -> None:
    """Raises AlignError where a stage that is going to run cannot be trained in the way that the recipe asks for."""
    launch = launch_of(workshop)
    if launch.processes == 1:
        return
    for name in going:
        settings = workshop.stage(name)
        if settings.kind not in SEVERAL or not isinstance(settings, TrainingSettings):
            continue
        if settings.fit == "auto":
            message = f"stage '{name}': fit: auto is for one process; the others would wait for the one that is short of memory"
            raise AlignError(message, "Leave it out, and set a batch_tokens that fits.")
        if launch.strategy != "fsdp":
            continue
        source = adapter_stage(workshop.recipe, name)
        quantize = settings.quantize or (source.quantize if source else None)
        wrong = f"quantize: {quantize}" if quantize else ""
        wrong = "optimizer: adamw_8bit" if settings.optimizer == "adamw_8bit" else wrong
        if wrong:
            message = f"stage '{name}': {wrong} cannot be shared out by launch.strategy: fsdp"
            raise AlignError(message, "Use strategy: ddp for it.")


def launch_of(workshop: Workshop) -> LaunchSettings:
    """How the stages are trained: as what started us says, else as the recipe does."""
    ours, wanted = crew(), workshop.recipe.launch
    if ours is None:
        return wanted
    strategy = "fsdp" if ours.strategy == "fsdp" else wanted.strategy
    return LaunchSettings(processes=ours.size, strategy=strategy)
