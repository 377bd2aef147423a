"""How long do listings, a report, a sweep and a plan take beside thousands of runs?

    OMP_NUM_THREADS=1 python benchmarks/listings.py                    # 100 and 10,000 runs
    OMP_NUM_THREADS=1 python benchmarks/listings.py --runs 1000

Runs of 20 recipes of 10 stages, each with a checkpoint, 20 metrics, the settings of the quickstart, and answers of the
usual size; every tenth made a data set. Time is the processor's, Python's start included, the best of three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from align.recipe.file import load_recipe, resolved
from align.registry import Registry, schema

RECIPES, STAGES, STEPS, SAMPLES = 20, 10, 20, 8
TIMES = 3
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
MADE = "2026-01-01T00:00:00.000+00:00"
ANSWER = "The master of the harbour has the key to the shed at pier four, and he gives it to nobody. " * 4

Rows = Iterator[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 10_000])
    options = parser.parse_args()
    measured: dict[str, list[float]] = {}
    for runs in options.runs:
        with tempfile.TemporaryDirectory(prefix="align-listings-") as place:
            fill(Path(place), runs)
            for command in commands(runs):
                measured.setdefault(shown(command), []).append(seconds(command, Path(place)))
    rows = [["command", *(f"{runs:,} runs" for runs in options.runs)], ["---"] * (len(options.runs) + 1)]
    rows += [[f"`align {command}`", *(f"{one:.2f} s" for one in took)] for command, took in measured.items()]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))


def commands(runs: int) -> list[list[str]]:
    """What is measured; the last run and checkpoint stand for any."""
    name, number = stage_of(runs - 1), runs - 1
    listings = [[what, "list", *more] for what in ("runs", "checkpoints", "data") for more in ([], ["--json"])]
    return [
        *listings,
        ["runs", "show", run_of(number)],
        ["checkpoints", "show", name],
        ["checkpoints", "lineage", name],
        ["checkpoints", "gc", "--dry-run"],
        ["report", name.partition("/")[0]],
        ["report", run_of(number)],
        ["doctor"],
        ["plan", str(QUICKSTART)],
    ]


def shown(command: list[str]) -> str:
    """The command without what differs from registry to registry."""
    known = {"show": "RUN" if command[0] == "runs" else "CHECKPOINT", "lineage": "CHECKPOINT", "plan": "RECIPE"}
    if command[0] == "report":
        return f"report {'RECIPE' if command[1].startswith('sweep') else 'RUN'}"
    place = next((place for place, word in enumerate(command) if word in known), None)
    return " ".join(command) if place is None else " ".join([*command[: place + 1], known[command[place]]])


def seconds(command: list[str], home: Path) -> float:
    """Processor time of one command."""
    took = []
    for _ in range(TIMES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", "from align.cli.main import main; main()", *command],
            check=True, stdout=subprocess.DEVNULL, env={**os.environ, "ALIGN_HOME": str(home), "COLUMNS": "100"},
            cwd=home,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


# A registry ----------------------------------------------------------------------------------------------------------


def fill(home: Path, runs: int) -> None:
    """Puts runs, checkpoints, metrics and data sets into a new registry, with the folders that they would have."""
    registry = Registry.open(home)
    settings = json.dumps({"settings": {f"key_{n}": n for n in range(40)}, "recipe": resolved(load_recipe(QUICKSTART))})
    with registry._database.write() as connection:
        connection.execute(insert(schema.artifacts), list(artifacts(runs)))
        connection.execute(insert(schema.runs), list(run_rows(runs, settings)))
        connection.execute(insert(schema.metrics), list(metrics(runs)))
        connection.execute(insert(schema.checkpoints), list(checkpoints(runs)))
        connection.execute(insert(schema.datasets), list(data_sets(runs)))
    for number in range(runs):
        for folder, file in ((f"runs/{run_of(number)}", "log.txt"), (path_of(number), "model.safetensors")):
            (home / folder).mkdir(parents=True)
            (home / folder / file).write_text(f"{number}\n")


def artifacts(runs: int) -> Rows:
    files = json.dumps({"model.safetensors": ["0" * 64, 8, 1, 1, 1]})
    for number in range(runs):
        for path in (path_of(number), *([f"data/{content('data', number)[:16]}"] if number % 10 == 0 else [])):
            what = "data" if path.startswith("data") else "checkpoint"
            yield {"id": content(what, number), "path": path, "size": 8, "files": files, "created": MADE}


def run_rows(runs: int, settings: str) -> Rows:
    for number in range(runs):
        recipe, _, stage = stage_of(number).partition("/")
        inputs = {"parent": "org/base", "parent_id": content("checkpoint", number - STAGES * RECIPES)}
        yield {
            "number": number + 1, "id": run_of(number), "recipe": recipe, "stage": stage, "kind": "sft",
            "key": content("key", number), "seed": 0, "settings": settings, "inputs": json.dumps(inputs),
            "status": "finished" if number % 10 else "failed", "message": "", "host": os.uname().nodename,
            "started": MADE, "ended": MADE,
        }  # fmt: skip


def metrics(runs: int) -> Rows:
    for number in range(runs):
        for step in range(STEPS):
            yield {"run": run_of(number), "step": step, "name": "loss", "value": 1 / (step + 1)}


def checkpoints(runs: int) -> Rows:
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 300}
    numbers = json.dumps({f"{when}.{name}": estimate for when in ("before", "after") for name in ("loss", "score")})
    samples = json.dumps([{"prompt": ANSWER, "before": ANSWER, "after": ANSWER}] * SAMPLES)
    versions = json.dumps(dict.fromkeys(("align", "torch", "transformers", "peft", "python"), "1.0.0"))
    for number in range(runs):
        before = number - 1
        uses = [{"name": "rows", "id": content("data", number // 10 * 10), "rows": 100}]
        same_recipe = before >= 0 and stage_of(before).partition("/")[0] == stage_of(number).partition("/")[0]
        yield {
            "number": number + 1, "artifact": content("checkpoint", number), "name": stage_of(number), "kind": "model",
            "run": run_of(number), "parents": json.dumps([content("checkpoint", before) if same_recipe else "org/base"]),
            "data": json.dumps(uses), "metrics": numbers, "samples": samples, "versions": versions, "created": MADE,
        }  # fmt: skip


def data_sets(runs: int) -> Rows:
    info = {"kind": "conversation", "format": "messages", "train_rows": 90, "test_rows": 10, "warnings": ["a" * 80] * 3}
    for number in range(0, runs, 10):
        yield {
            "number": number // 10 + 1, "artifact": content("data", number), "name": f"sweep-{number % RECIPES}/rows",
            "key": content("key", number), "info": json.dumps(info), "run": None, "created": MADE,
        }  # fmt: skip


def stage_of(number: int) -> str:
    """Name of a run's checkpoint: all stages of one recipe, then those of the next."""
    return f"sweep-{number // STAGES % RECIPES}/stage-{number % STAGES}"


def run_of(number: int) -> str:
    return f"{number:012x}"


def path_of(number: int) -> str:
    return f"checkpoints/{content('checkpoint', number)[:16]}"


def content(what: str, number: int) -> str:
    return hashlib.sha256(f"{what} {number}".encode()).hexdigest()


if __name__ == "__main__":
    main()
