"""What a saved state costs, part by part, and what of it a thread takes off the training.

    OMP_NUM_THREADS=1 python benchmarks/saving.py --shapes 15m 135m --out docs/saving.md

A state is what the trainer writes: weights that train, AdamW's two moments. Each line is a process of its own, the median of
a few saves. The pause is the longest for which a thread that needs Python's lock, as one that starts the kernels of an
accelerator does, stands still while another one writes a state, and beside it while the other one sleeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.work import SHAPES, model_folder, say

from align.machine import this_machine

RANK = 16
SAVES = 3
ROWS, TOKENS = 16, 256  # of an optimiser step: the default batch_size, and rows of this length
TIMED_ROWS = 2
SAVE_STEPS = 200  # the default
WAYS = ("full", "LoRA")
# A billion weights trained whole on a GPU: bytes of its state, seconds of a step, and bytes per second to the host and to disk
BILLION = {"state": 12e9, "step": 0.3, "to_host": 8e9}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["15m", "135m"])
    parser.add_argument("--folder", type=Path, help="Where states are written; the disk counts.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        say(measured(*options.one, options.folder))
        return
    found = {(shape, way): apart(shape, way, options.folder) for shape in options.shapes for way in WAYS}
    text = page(found)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def apart(shape: str, way: str, folder: Path | None) -> dict[str, float]:
    """One measurement in a process of its own."""
    where = ["--folder", str(folder)] if folder else []
    done = subprocess.run(
        [sys.executable, __file__, "--one", shape, way, *where], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def measured(shape: str, way: str, folder: Path | None) -> dict[str, float]:
    """Seconds of each part of a save, and of an optimiser step."""
    import torch

    from align.models.loading import load_policy
    from align.models.source import source_of
    from align.recipe.settings import AdapterSettings
    from align.saves import copied

    adapter = AdapterSettings(rank=RANK) if way == "LoRA" else None
    model = load_policy(source_of(model_folder(shape)), adapter=adapter, trainable=True, precision="float32")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-4, fused=True)
    step = _step_seconds(model, optimizer)
    trained, moments = {name: weight.detach() for name, weight in weights.items()}, optimizer.state_dict()
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for number in range(SAVES):
            took, (own, state) = _timed(lambda: (copied(trained), copied(moments)))
            parts.setdefault("copy", []).append(took)
            for part, seconds in _written(own, state, Path(name) / str(number)).items():
                parts.setdefault(part, []).append(seconds)
        work = Path(name) / "beside"
        idle = _longest_pause(lambda: time.sleep(1))
        pause = _longest_pause(lambda: _written(own, state, work))
    size = sum(weight.numel() * 4 for weight in weights.values()) * 3
    return {
        "bytes": size,
        "step": step,
        "idle": idle,
        "pause": pause,
        **{part: statistics.median(s) for part, s in parts.items()},
    }


def _step_seconds(model: Any, optimizer: Any) -> float:
    """Of a whole optimiser step, from one over a few of its rows."""
    from align.chat.encoded import Encoded
    from align.stages.objectives import AnswerLoss

    rows = [
        Encoded([3 + (place * 7 + row) % 900 for place in range(TOKENS)], [True] * TOKENS) for row in range(TIMED_ROWS)
    ]

    def learn() -> None:
        (AnswerLoss()(model, rows)[0] / TOKENS).backward()

    learn()
    optimizer.step()
    passes, updates = _timed(learn)[0], _timed(optimizer.step)[0]
    return passes * ROWS / TIMED_ROWS + updates


def _written(trained: Any, moments: Any, state: Path) -> dict[str, float]:
    """Seconds to write, hash and sync a state."""
    import torch
    from safetensors.torch import save_file

    from align.registry.artifacts import sync
    from align.registry.hashing import sha256_file

    state.mkdir()
    files = [state / "trained.safetensors", state / "optimizer.pt"]
    weights = _timed(lambda: save_file(trained, files[0]))[0]
    optimizer = _timed(lambda: torch.save(moments, files[1]))[0]
    return {
        "write": weights + optimizer,
        "sync": _timed(lambda: [sync(file) for file in files])[0],
        "hash": _timed(lambda: [sha256_file(file) for file in files])[0],
    }


def _longest_pause(work: Callable[[], object]) -> float:
    """Milliseconds for which a loop that needs Python's lock stands still, at the longest, while another thread works."""
    thread = threading.Thread(target=work)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        sum(range(200))
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest * 1000


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def page(found: dict[tuple[str, str], dict[str, float]]) -> str:
    """docs/saving.md."""
    machine = this_machine()
    lines = [
        "# What a saved state costs", "",
        f"Made by `python benchmarks/saving.py`: {machine.processor}, one thread; steps of {ROWS} rows of {TOKENS} tokens in float32, "
        f"a state every {SAVE_STEPS} steps (the default), LoRA of rank {RANK}. Seconds; load average of the machine {os.getloadavg()[1]:.1f}.", "",
        "| shape | trained | state, MB | step | copy | write | hash | sync | share of a run | longest pause, ms (alone) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (shape, way), one in found.items():
        cells = " | ".join(f"{one[part]:.2f}" for part in ("step", "copy", "write", "hash", "sync"))
        share, pause = _share(_disk(one), one["step"]), f"{one['pause']:.0f} ({one['idle']:.0f})"
        lines.append(f"| {shape} | {way} | {one['bytes'] / 1e6:,.0f} | {cells} | {share:.2%} | {pause} |")
    return "\n".join([*lines, "", *_conclusion(found)]) + "\n"


def _conclusion(found: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    """What this says of a GPU, where a step is short and the state as large."""
    most = max(found.values(), key=lambda one: one["bytes"])
    rate, between = most["bytes"] / _disk(most), BILLION["step"] * SAVE_STEPS
    here, copy = BILLION["state"] / rate, BILLION["state"] / BILLION["to_host"]
    beside = copy + max(0.0, here - between)
    return [
        "On a CPU a step takes so long that a state is next to nothing, and a thread would take its time from the same cores: "
        "states are written at once.", "",
        f"Reckoned, not measured: a billion weights trained whole on a GPU have a state of {BILLION['state'] / 1e9:.0f} GB. With steps "
        f"of {BILLION['step']} s, {BILLION['to_host'] / 1e9:.0f} GB/s to the host and the {rate / 1e9:.2f} GB/s of the largest state "
        f"above (written, hashed and synced), each takes {copy + here:.0f} s, {_share(copy + here, BILLION['step']):.0%} of a run. With "
        f"all but the copy in a thread it is {beside:.1f} s, {_share(beside, BILLION['step']):.0%}: the copy, and what is not written "
        f"yet of the state before when the next one is due, {between:.0f} s later. So states are written in a thread where weights "
        "lie on an accelerator.",
    ]  # fmt: skip


def _disk(one: dict[str, float]) -> float:
    return one["write"] + one["hash"] + one["sync"]


def _share(save: float, step: float) -> float:
    """Of a run's time that goes into its states."""
    return save / (save + SAVE_STEPS * step)


if __name__ == "__main__":
    main()
