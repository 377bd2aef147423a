"""What the allocator's settings change: a stage's peak memory and processor time, with glibc's caches of small blocks and without.

    python benchmarks/allocator.py --out docs/allocator.md    # about 15 minutes

The same stages as benchmarks/memory.py with more steps, `align run` in processes of their own, both settings in turn. `kept`
only keeps freed memory (what `align` did before); `align` is align/allocator.py as it is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from memory import CASES, Case, align, command, environment, write_recipe

from align.allocator import SETTINGS, TUNABLES, TUNED
from align.machine import this_machine

KEPT = ":".join(f"glibc.malloc.{name}={SETTINGS[name]}" for name in ("mmap_threshold", "trim_threshold", "top_pad"))
WAYS = {"kept": KEPT, "align": TUNED}
STEPS, ROUNDS = 8, 3
KEYS = ("sft-1m", "sft-15m", "sft-15m-checkpointing", "lora-15m", "lora-15m-auto", "dpo-15m", "reward-15m")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KEYS), help="cases of benchmarks/memory.py, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("docs/allocator.md"))
    options = parser.parse_args()
    lines = [
        "# What the allocator's settings change",
        "",
        f"Made by `python benchmarks/allocator.py`: {this_machine().processor}, one thread; {STEPS} optimiser steps, whole "
        f"commands, medians of {ROUNDS} runs in turn. `kept`: freed memory is kept, and nothing else is set. Seconds are of the "
        "processor.",
        "",
        "| case | kept, MiB | align, MiB | ratio | kept, s | align, s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in options.only.split(","):
        case = longer(next(case for case in CASES if case.key == key))
        runs = [{way: run(case, tunables) for way, tunables in WAYS.items()} for _ in range(ROUNDS)]
        mib, seconds = (
            {way: statistics.median(one[way][number] for one in runs) for way in WAYS} for number in range(2)
        )
        lines.append(
            f"| {key} | {mib['kept']:,.0f} | {mib['align']:,.0f} | {mib['align'] / mib['kept']:.2f} "
            f"| {seconds['kept']:.1f} | {seconds['align']:.1f} | {seconds['align'] / seconds['kept']:.2f} |"
        )
        options.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def longer(case: Case) -> Case:
    """The case with as many steps as are timed."""
    stage = {**case.stages[case.stage], "max_steps": STEPS, "epochs": STEPS}
    return replace(case, stages={**case.stages, case.stage: stage})


def run(case: Case, tunables: str) -> tuple[float, float]:
    """MiB that a command had resident at most, and seconds of the processor that it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(case, folder)
        for stage in list(case.stages)[:-1]:
            align(folder, "run", str(recipe), "--stage", stage)
        process = subprocess.Popen(
            command("run", str(recipe), "--stage", case.stage),
            env={**environment(folder), TUNABLES: tunables}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
