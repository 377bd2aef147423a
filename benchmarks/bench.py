"""align beside TRL, transformers and its own bare loop on the same work: what `make bench` runs.

    python benchmarks/bench.py --out docs/performance.md                 # everything, and the page
    python benchmarks/bench.py --only sft-15m,dpo --out docs/performance.md   # these rows anew, into the same page
    python benchmarks/bench.py --quick --only sft                        # the smallest shape, one turn: does it work?

The sides of a row take turns in processes of their own. Exits with 1 when losses that must agree do not. The numbers lie
in a JSON file beside the page, so that a row can be measured again without the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import critique_speed
import ppo_peer
from bench_page import agreement, page, verdicts
from bench_rows import (
    FOUR,
    GENERATE,
    HELP,
    LISTS,
    LOOP,
    OURS,
    PPO_PEER,
    ROWS,
    TRL_HELP,
    Row,
    Side,
    chosen_rows,
    quick_rows,
)
from peers.work import LONGEST, SHAPES, instruction_rows, preference_rows, prompt_rows

from align.machine import this_machine

HERE = Path(__file__).parent
ROOT = HERE.parent
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
OWN_TRL = "trl==1.12.0"  # the last TRL with PPO
Results = dict[str, list[dict[str, Any]]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows, separated by commas: a key, or all of a family (sft)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(this_machine().usable_cores))
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="default: what align chooses, on both sides"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="the results instead of the page on stdout")
    parser.add_argument("--out", type=Path, help="the page; the numbers go to the JSON file beside it")
    parser.add_argument("--peer", default=sys.executable, help="python of an environment with TRL 1.16")
    parser.add_argument(
        "--ppo-peer", type=Path, default=ROOT / "build/trl112/bin/python", help="the same with TRL 1.12.0"
    )
    options = parser.parse_args()
    options.turns = 1 if options.quick else options.turns
    known = quick_rows() if options.quick else list(ROWS)
    rows = chosen_rows(known, options.only)
    measured = compare(rows, options)
    before = options.out.read_text(encoding="utf-8") if options.out and options.out.is_file() else ""
    text = page(known, measured, before)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(json.dumps({row.key: measured[row.key] for row in rows}, indent=1) if options.json else text)
    missed = sum(not verdict.met for row in rows for verdict in verdicts(row, measured[row.key]))
    sys.stderr.write("" if options.quick else f"{missed} targets missed\n")
    if apart := [line for row in rows for line in agreement(row, measured[row.key]).problems]:
        sys.exit("losses do not agree:\n" + "\n".join(apart))


def compare(rows: Sequence[Row], options: Namespace) -> dict[str, Any]:
    """What is known of all rows, with these measured anew; kept beside the page after each row, so that a stop loses one."""
    kept = options.out.with_suffix(".json") if options.out else None
    measured: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.is_file() else {}
    _say_estimate(rows, measured, options.turns)
    for row in rows:
        began = time.perf_counter()
        facts, sides = measure(row, options)
        seconds = round(time.perf_counter() - began)
        measured[row.key] = {**facts, "turns": options.turns, "elapsed_seconds": seconds, "sides": sides}
        if kept:
            kept.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return measured


def _say_estimate(rows: Sequence[Row], measured: Mapping[str, Any], turns: int) -> None:
    """From the last run where there is one."""
    minutes = 0.0
    for row in rows:
        last = measured.get(row.key)
        minutes += last["elapsed_seconds"] / 60 / last["turns"] * turns if last else row.minutes * turns / 3
    sys.stderr.write(f"{len(rows)} rows, {turns} turns: about {minutes:.0f} minutes\n")


def measure(row: Row, options: Namespace) -> tuple[dict[str, Any], Results]:
    """What was measured on, and the results of every side, turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        work: dict[str, Any] = {"kind": "", "adapter": False, "quantize": None, **row.work}
        work |= {"folder": folder, "precision": options.precision}
        prepared = _run(_ours("prepare", _written(work)), options) if row.work else {"precision": "", "device": ""}
        work |= prepared
        results = _results(row, work, options)
    machine = this_machine()
    facts = {
        "date": date.today().isoformat(), "device": work["device"],
        "precision": "float32" if row.kind == "critique" else work["precision"],
        "threads": 1 if row.kind in ("rollouts", "critique") else options.threads,
        "machine": f"{machine.processor}, {machine.usable_cores:g} cores"
        + (f" ({', '.join(machine.features)})" if machine.features else ""),
        "versions": {name: version(name) for name in LIBRARIES},
    }  # fmt: skip
    return facts, results


def _results(row: Row, work: dict[str, Any], options: Namespace) -> Results:
    match row.kind:
        case "train":
            return _train(row, work, options)
        case "ppo":
            return _ppo(work, options)
        case "rollouts":
            return _rollouts(work, options)
        case "critique":
            return _critique(work, options)
        case "start-up":
            return _start_up(options.turns)


def _train(row: Row, work: dict[str, Any], options: Namespace) -> Results:
    """Both sides train on one file of rows."""
    steps, vocabulary = work["warmup"] + work["steps"], SHAPES[work["shape"]]["vocab_size"]
    count = steps * work["batch"]
    if work["kind"] == "sft":
        rows: list[Any] = instruction_rows(count, vocabulary)
        while sum(map(len, rows)) < 1.2 * LONGEST * steps:  # the packed side has a pack of its own for every step
            rows = instruction_rows(len(rows) + work["batch"], vocabulary)
    else:
        rows = preference_rows(count, vocabulary)
    path = _written(work | {"rows": rows})
    found: Results = {side.name: [] for side in row.sides if _takes_part(side, work)}
    for turn in range(options.turns):
        sides = [side for side in row.sides if side.name in found and not (side.once and turn)]
        for side in sides if turn % 2 == 0 else reversed(sides):
            script = "ours.py" if side.script == "ours" else "peers/trl_train.py"
            python = sys.executable if side.script == "ours" else options.peer
            command = [python, str(HERE / script), *side.options, "--work", path]
            found[side.name].append(_run(command, options, ALLOCATOR if side.tuned else None))
            sys.stderr.write(f"{row.key}, turn {turn + 1}, {side.name}: {_shown(found[side.name][-1])}\n")
    return found


def _takes_part(side: Side, work: Mapping[str, Any]) -> bool:
    """TRL with its own bfloat16 is another side only where align does not choose bfloat16."""
    return "--own-precision" not in side.options or work["precision"] == "float32"


def _shown(result: Mapping[str, Any]) -> str:
    losses = result.get("losses") or []
    seconds = result.get("seconds", result.get("total_seconds", 0.0))
    return f"{seconds:.2f} s" + (f", last loss {losses[-1]:.5f}" if losses else "")


def _ppo(work: dict[str, Any], options: Namespace) -> Results:
    """Through ppo_peer.py: TRL 1.12.0 in an environment of its own, made here if it is not there yet."""
    if not options.ppo_peer.exists():
        _make_environment(options.ppo_peer.parents[1])
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        rows = prompt_rows(work["batch"] * work["iterations"], SHAPES[work["shape"]]["vocab_size"])
        prompts.write_text(json.dumps(rows))
        asked = Namespace(
            **{name: work[name] for name in ("shape", "batch", "response", "epochs", "iterations")}, peer=options.ppo_peer,
            prompts=str(prompts), threads=options.threads, turns=options.turns, ways=list(ppo_peer.WAYS),
            bf16=work["precision"] == "bfloat16",
        )  # fmt: skip
        found = ppo_peer.compare(asked, work["model"])
    named = {PPO_PEER if side == ppo_peer.PEER else side: results for side, results in found.items()}
    assert FOUR in named
    return {side: [{**result, "units": 1} for result in results] for side, results in named.items()}


def _make_environment(folder: Path) -> None:
    sys.stderr.write(f"making {folder} with {OWN_TRL}\n")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pinned = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "accelerate", "datasets")]
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", OWN_TRL, *pinned], check=True)


def _rollouts(work: dict[str, Any], options: Namespace) -> Results:
    """Through rollouts.py, both sides in one process."""
    named = ("shape", "batch", "prompts")
    command = [sys.executable, str(HERE / "rollouts.py"), "--dtype", work["precision"], "--turns", str(options.turns)]
    command += [part for name in named for part in (f"--{name}", str(work[name]))]
    found = _run(command, options)["turns"]
    return {OURS: found["align"], GENERATE: found["transformers"]}


def _critique(work: dict[str, Any], options: Namespace) -> Results:
    """Through critique_speed.py, whose sides all write in float32."""
    load = work["shape"] if work["shape"] in critique_speed.LOADS else "harbour"
    found = critique_speed.compare(load, options.turns, work["rows"])
    names = {critique_speed.LOOP: LOOP, critique_speed.OURS: OURS}
    return {
        names.get(side, side): [
            {
                **result, "units": work["rows"], "seconds": work["rows"] / result["rows_per_wall_second"],
                "processor_seconds": work["rows"] / result["rows_per_second"],
            }
            for result in results
        ]
        for side, results in found.items()
    }  # fmt: skip


def _start_up(turns: int) -> Results:
    """Wall time of commands, in a registry with nothing in it; of the listings the slowest."""
    program, trl = (str(Path(sys.executable).with_name(name)) for name in ("align", "trl"))
    lists = [[program, what, "list"] for what in ("runs", "checkpoints", "data")]
    found: Results = {HELP: [], LISTS: [], TRL_HELP: []}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(max(3, turns)):
            found[HELP].append(_timed([program, "--help"], home))
            found[LISTS].append(max((_timed(command, home) for command in lists), key=lambda one: one["seconds"]))
        for _ in range(turns):
            found[TRL_HELP].append(_timed([trl, "sft", "--help"], home))
    return found


def _timed(command: Sequence[str], home: str) -> dict[str, Any]:
    began = time.perf_counter()
    subprocess.run(
        command, check=True, env=os.environ | {"ALIGN_HOME": home}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return {"seconds": time.perf_counter() - began, "units": 1}


def _ours(what: str, work: str) -> list[str]:
    return [sys.executable, str(HERE / "ours.py"), what, "--work", work]


def _written(work: Mapping[str, Any]) -> str:
    path = Path(work["folder"]) / "work.json"
    path.write_text(json.dumps(work))
    return str(path)


def _run(command: Sequence[str], options: Namespace, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The RESULT line of a process. Raises SystemExit with what it said when it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)} | dict(more or {})
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


if __name__ == "__main__":
    main()
