"""The constitutional stage on real prompts, with a critic behind HTTP that is killed once.

    ALIGN_SHARED=FOLDER python benchmarks/critique_real.py --out docs/critique-real.md

Runs benchmarks/critique-real.yaml in a registry of its own: sft; then the critique stage, whose critic is that sft model
served by benchmarks/served_model.py (any vLLM or llama.cpp server takes its place). The server is killed when a part of
the rows is finished; after it is back, the same command goes on, and the data sets train sft, dpo and a reward model.
Then the critic is held against pairs that people have judged. Needs the folder with the real data (ALIGN_SHARED, default:
`shared` beside the project).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.critique.rows import FAULTS

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("ALIGN_SHARED", ROOT.parent / "shared"))
RECIPE = ROOT / "benchmarks/critique-real.yaml"
PAIRS = "data/preference/hh_harmless_1300.jsonl.gz"
PATHS = {
    "model": "models/stories260K",
    "data.instructions.path": "data/instruct/instructions.jsonl",
    "data.prompts.path": PAIRS,
}
KILLED_AT = 60  # finished rows
SHOWN = 5  # rows on the page
JUDGED = 200  # pairs for --judge-only
WIDTH = 120


@dataclass(frozen=True)
class Bench:
    """Where everything is. home: the registry; port: of the server."""

    home: Path
    port: int

    def align(self, *arguments: str | Path, more: Sequence[str] = ()) -> subprocess.Popen[str]:
        """One command of align on the recipe, with the paths of the data set."""
        settings = [f"{key}={SHARED / path}" for key, path in PATHS.items()]
        url = f"stages.revised.critic.url=http://127.0.0.1:{self.port}/v1"
        overrides = [part for setting in (*settings, *(more or [url])) for part in ("--set", setting)]
        command = [str(Path(sys.executable).with_name("align")), *map(str, arguments), "--json", *overrides]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"ALIGN_HOME": str(self.home), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def told(self, *arguments: str | Path, more: Sequence[str] = ()) -> Any:
        """The JSON of a command that has to succeed."""
        out, errors = (process := self.align(*arguments, more=more)).communicate()
        if process.returncode:
            raise SystemExit(f"{arguments}: exit {process.returncode}\n{errors}")
        return json.loads(out)

    def serve(self, folder: str) -> subprocess.Popen[str]:
        """The server, ready for requests."""
        command = [sys.executable, str(ROOT / "benchmarks/served_model.py"), folder, "--port", str(self.port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert server.stdout is not None
        if "http" not in server.stdout.readline():
            raise SystemExit("the server did not start")
        return server

    def finished(self, name: str = "rows.jsonl") -> list[str]:
        """Lines of the rows that are on disk."""
        files = list(self.home.glob(f"**/{name}"))
        return files[0].read_text(encoding="utf-8").splitlines() if files else []


@dataclass(frozen=True)
class Found:
    """What came of it. kept: finished rows when the server had died; after: the same rows at the end are equal to them."""

    stages: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    held_out: int
    exit_code: int
    complaint: str
    kept: int
    unchanged: bool
    judged: dict[str, dict[str, Any]]
    seconds: float


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"no real data at {SHARED}: set ALIGN_SHARED")
    with tempfile.TemporaryDirectory() as home:
        text = page(run(Path(home)))
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def run(home: Path) -> Found:
    """Everything, in the registry `home`."""
    began = time.monotonic()
    bench = Bench(home, free_port())
    sft = bench.told("run", RECIPE, "--stage", "sft")[-1]["checkpoint"]["path"]
    server = bench.serve(sft)
    stage = bench.align("run", RECIPE, "--stage", "revised")
    while stage.poll() is None and len(bench.finished()) < KILLED_AT:
        time.sleep(0.05)
    server.kill()
    server.wait()
    complaint = stage.communicate()[1]
    kept = bench.finished()
    server = bench.serve(sft)
    try:
        chain = bench.told("run", RECIPE)
        rows = bench.finished()
        judging = ("critique", RECIPE, "--judge-only", "--data", SHARED / PAIRS, "--rows", str(JUDGED))
        judged = {
            "over HTTP": bench.told(*judging)["metrics"],
            "in this process": bench.told(*judging, more=["stages.revised.critic=self"])["metrics"],
        }
    finally:
        server.kill()
        server.wait()
    return Found(
        {entry["stage"]: entry for entry in chain}, [json.loads(line) for line in rows], len(bench.finished("held_out.jsonl")),
        stage.returncode,
        complaint, len(kept), set(kept) <= set(rows), judged, time.monotonic() - began,
    )  # fmt: skip


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The page ------------------------------------------------------------------------------------------------------------

INTRODUCTION = """# The constitutional stage on real prompts

`align critique` with {rows} prompts of hh-rlhf (harmless-base, test split, MIT) and {held_out} held-out ones. The policy is a
pretrained Llama of 260,032 weights (stories260K, MIT) that learnt from 1,100 human-written instructions (Apache-2.0). The
critic stands behind HTTP: the same model, served by `benchmarks/served_model.py`; a vLLM or llama.cpp server takes its
place by its `url:`. Principles: data/constitutions/general.yaml. Made by
`ALIGN_SHARED=FOLDER python benchmarks/critique_real.py --out docs/critique-real.md` in {minutes:.1f} minutes on two processor
cores that other work shared.

What this shows is that the stage runs to its end on real input, and that what it makes trains the next stages. It does not
show better answers: a model of this size cannot criticise, and its context of 512 tokens is too small for most prompts.

## Killed and started again

The server was killed when {killed} rows were finished. `align run` ended with exit code {code}:

```
{complaint}
```

{kept} rows were on disk. With the server back, the same command went on: {total} rows, each once, and the {kept} among them
{unchanged}.
"""
JUDGING = """\
Chance, as was to be expected. A position bias near 0 or 1 says that the critic names the same letter whatever it reads;
over both orders that cancels, and what is left is noise near a half. In this vocabulary of 512 entries the answer " B" is
one token and " A" is two. A model in this process is asked for each as a whole; over HTTP only the first token is seen."""


def page(found: Found) -> str:
    """All of it as Markdown."""
    counts = Counter(row["index"] for row in found.rows)
    once = max(counts.values(), default=0) == 1
    complaint = [line for line in found.complaint.splitlines() if line.strip()][-2:]
    lines = [
        INTRODUCTION.format(
            rows=len(found.rows), held_out=found.held_out, minutes=found.seconds / 60, killed=KILLED_AT, code=found.exit_code,
            complaint="\n".join(complaint), kept=found.kept, total=len(found.rows),
            unchanged="unchanged to the byte" if found.unchanged and once else "CHANGED",
        ),
        *_fates(found), *_next_stages(found), *_judging(found), *_some_rows(found),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _fates(found: Found) -> list[str]:
    sft, pairs = (found.stages["revised"]["data"][name]["info"] for name in ("sft", "preferences"))
    told = sft["stage"]["counts"]
    fates = [("revised", "the revision was taken", told["revised"])]
    fates += [(name, FAULTS[name], number) for name, number in told["apart"].items()]
    long_prompts = sum(row["fault"] == "too_long" and not row["answers"][0] for row in found.rows)
    probabilities = [one["probability"] for row in found.rows for one in row["comparisons"]]
    known = sorted(one for one in probabilities if one is not None)
    return [
        f"## What became of {told['prompts']} prompts",
        "",
        "| | is | prompts |",
        "|---|---|---|",
        *(f"| {name} | {words} | {number} |" for name, words, number in fates),
        "",
        _wrapped(
            f"Of those that are too long, {long_prompts} prompts leave no room for an answer; the others left none for a "
            "request about it. Two answers were compared under two principles in both orders "
            f"{told['comparisons']} times; {len(probabilities) - len(known)} of these pairs were too long to ask about, and the "
            f"probabilities of the others lie between {known[0]:.2f} and {known[-1]:.2f}: this critic hardly sees a "
            "difference, and the soft labels say so."
        ),
        "",
        f"`.sft` has {sft['train_rows']} training rows and {sft['test_rows']} held-out ones, `.preferences` "
        f"{pairs['train_rows']} and {pairs['test_rows']}.",
        "",
    ]


def _next_stages(found: Found) -> list[str]:
    wanted = {
        "told": ("sft on `.sft`: loss", "loss"),
        "aligned": ("dpo on `.preferences`: implicit accuracy", "accuracy"),
        "reward": ("reward model on `.preferences`: accuracy", "accuracy"),
    }
    lines = ["## The next stages", "", "| held out | before | after | rows |", "|---|---|---|---|"]
    for stage, (words, name) in wanted.items():
        metrics = found.stages[stage]["checkpoint"]["metrics"]
        before, after = metrics[f"before.{name}"], metrics[f"after.{name}"]
        lines.append(f"| {words} | {_interval(before)} | {_interval(after)} | {after['n']} |")
    return [*lines, "", "With so few held-out rows the intervals (95%) say little more than that training ran.", ""]


def _judging(found: Found) -> list[str]:
    lines = [
        "## The critic as a judge of human pairs",
        "",
        f"`align critique --judge-only` on the first {JUDGED} pairs of the file. Position bias: how often the reply that",
        "stands first was preferred, 0.5 where the order does not matter. Consistent: the same reply in both orders.",
        "",
        "| critic | accuracy | position bias | consistent | loss | calibration error | pairs | too long |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for where, metrics in found.judged.items():
        cells = [_interval(metrics[name]) for name in ("accuracy", "first", "consistent", "loss", "ece")]
        lines.append(f"| {where} | {' | '.join(cells)} | {metrics['accuracy']['n']} | {metrics['too_long']} |")
    return [*lines, "", JUDGING, ""]


def _some_rows(found: Found) -> list[str]:
    some = [row for row in found.rows if row["steps"] and not row["fault"]][:SHOWN]
    lines = ["## Rows", "", "The first rows that were taken (prompts left out).", ""]
    lines += ["| principle | answer | critique | revision |", "|---|---|---|---|"]
    for row in some:
        step = row["steps"][-1]
        texts = [row["answers"][0], step["critique"], row["final"]]
        lines.append(f"| {step['principle']} | " + " | ".join(map(_cell, texts)) + " |")
    return lines


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _interval(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


if __name__ == "__main__":
    main()
