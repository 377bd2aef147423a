"""Two processes of one run for tests, without the seconds that a fresh Python needs to import torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import AlignError, Interrupted

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["align.run", "align.stages.sft", "align.stages.dpo", "align.stages.reward", "tests.test_run"]
)
PATIENCE_SECONDS = 240


class Failure(NamedTuple):
    """An exception that `work` ended with; exit_code: 0 where it is none of ours."""

    kind: str
    exit_code: int
    message: str


def on_two(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` gives in each of two processes, or its Failure; None where it died. folder: is made."""
    folder.mkdir(parents=True)
    processes = [_CONTEXT.Process(target=_child, args=(folder, rank, work, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
    found = [folder / f"result-{rank}" for rank in range(2)]
    return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in found]  # noqa: S301  # our own


def _child(folder: Path, rank: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "ALIGN_MEETING": f"file://{folder}/meeting", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        result = work(rank, *arguments)
    except (AlignError, Interrupted) as error:
        result = Failure(type(error).__name__, error.exit_code, error.message)
    except Exception as error:
        traceback.print_exc()
        result = Failure(type(error).__name__, 0, str(error))
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
