"""Tasks of lm-evaluation-harness on a checkpoint, where that library is installed (the extra `harness`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from align.errors import AlignError
from align.models.source import Source


def harness_results(source: Source, tasks: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """The harness's results, by task. limit: rows of each task, None for all.

    Raises AlignError when the library is not installed, does not know a task, or cannot run the checkpoint.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise AlignError("lm-evaluation-harness is not installed", "Install it: pip install 'align[harness]'.")
    if source.is_reward:
        raise AlignError(f"{source.path}: a reward model, which the harness cannot run", "Name a language model.")
    if source.quantize is not None:
        raise AlignError(
            f"{source.path}: an adapter on a base in {source.quantize}, which the harness would load in full precision",
            "Merge it first: align merge CHECKPOINT --out FOLDER.",
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    if missing := [task for task in tasks if task not in known]:
        raise AlignError(f"the harness has no task '{missing[0]}'", "`lm-eval ls tasks` lists them.")
    options: dict[str, Any] = {"pretrained": source.root.path, "trust_remote_code": source.trust_remote_code}
    if source.is_adapter:
        options |= {"peft": source.path, "tokenizer": source.path}
    found = simple_evaluate(model="hf", model_args=options, tasks=list(tasks), limit=limit)
    return dict(found["results"])
