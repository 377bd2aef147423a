"""Puts data sets, checkpoints and runs into a registry, with files of a few bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from align.registry import CheckpointRecord, DataRecord, DataUse, Registry, Run


def begin(
    registry: Registry, stage: str = "sft", *, key: str | None = None, inputs: dict[str, Any] | None = None
) -> Run:
    """A run of recipe `harbour`."""
    return registry.begin_run(
        recipe="harbour", stage=stage, kind="sft", key=key or f"key of {stage}", settings={"epochs": 2},
        inputs=inputs or {}, seed=0,
    )  # fmt: skip


def finish(
    run: Run, name: str, content: str, parents: Sequence[str] = (), data: Sequence[DataUse] = (), **more: Any
) -> CheckpointRecord:
    """Two small files in nested folders, registered as a checkpoint."""
    (run.artifact / "nested").mkdir(exist_ok=True)
    (run.artifact / "model.safetensors").write_text(content)
    (run.artifact / "nested" / "config.json").write_text("{}")
    more = {"kind": "model", "metrics": {}, "versions": {"align": "0.1.0"}, **more}
    return run.finish_checkpoint(name=name, parents=parents, data=data, **more)


def add_checkpoint(
    registry: Registry, name: str = "harbour/sft", content: str | None = None, parents: Sequence[str] = (), **more: Any
) -> CheckpointRecord:
    """A finished run and its checkpoint; its content is its name, if nothing else is given."""
    with begin(registry, name.rpartition("/")[2]) as run:
        return finish(run, name, name if content is None else content, parents, **more)


def fail(registry: Registry, stage: str = "sft", work: Callable[[Run], object] | None = None, **more: Any) -> Run:
    """A run that does its work, if any, and fails."""
    with suppress(ArithmeticError), begin(registry, stage, **more) as run:
        if work:
            work(run)
        raise ArithmeticError("loss is nan")
    return run


def add_data(registry: Registry, name: str = "harbour/instructions", text: str = '{"text": "a"}\n') -> DataRecord:
    """A data set with one file of rows."""
    folder = registry.new_folder("data")
    (folder / "train.jsonl").write_text(text)
    return registry.add_data(name, f"key of {text}", folder, {"train_rows": text.count("\n")})
