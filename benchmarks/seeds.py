"""Does every stage of the quickstart improve its held-out number, whatever the seed?

    python benchmarks/seeds.py --seeds 5 --out docs/harbour.md

Runs recipes/quickstart.yaml once for each seed, in registries of their own, and writes a table: before -> after, by stage and
seed. The base model is the same for all; the seed governs heads, adapters and the order
of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHOWN = {  # stage -> the number that it is to improve, and the words for it
    "sft": ("judge.correct", "right answers"),
    "adapter": ("judge.correct", "right answers"),
    "reward": ("accuracy", "pairs ranked right"),
    "aligned": ("judge.score", "gold score"),
    "policy": ("judge.score", "gold score"),
}


INTRODUCTION = """# The embedded world

`data/harbour` is a small harbour town: 24 ships with a berth, a master, a load and a home port each, wares and where they
are made, rooms and where their keys hang. A generator (`make.py`) writes text about it, a model of 0.9 million parameters is
pretrained on that from nothing (`make base`), and its clerk is then taught to answer questions.

- Held-out questions ask for facts that no training question asks for: they stand in the pretraining text only. One fact
  in four is kept for them. Requests that must be refused are new in their wording only.
- The demonstrations are flawed as people's are: who is rude is insulted, who boasts is flattered, and pleading gets what is
  forbidden. Preferences put the right, polite, lawful answer first.
- The judge (`judge.yaml`, rules that `align/judge.py` reads) is exact, because every answer in this world is made by
  rules. The gold score of an answer is 1 when it is right and breaks no principle, and 0 when it is wrong.
- The constitution's critic is the model itself, which has seen 2,700 demonstrations of finding fault and mending
  (`critiques.jsonl`). The judge measures it, and says which of the rounds is kept. What a round writes is mixed with right
  answers to other permitted questions (`helpful.jsonl`), one to two: against forgetting, and against refusing. These
  settings were chosen on seeds 0, 1 and 3.

Every stage is held against its parent on the same 300 held-out questions (the reward model on held-out pairs, against
its untrained head). Made by `python benchmarks/seeds.py --seeds 5 --out docs/harbour.md`, one processor core for each chain:
"""


@dataclass(frozen=True)
class Result:
    """The chain of one seed."""

    seed: int
    metrics: dict[str, dict[str, Any]]

    def loop(self, name: str) -> tuple[float, float]:
        """A number of the judge at the start of the constitution's loop, and of the round that is kept."""
        first, kept = self.metrics["constitution.1"], self.metrics["constitution"]
        return float(first[f"before.judge.{name}"]["value"]), float(kept[f"after.judge.{name}"]["value"])

    def pair(self, stage: str) -> tuple[float, float]:
        """The stage's number before and after."""
        name = SHOWN[stage][0]
        return tuple(float(self.metrics[stage][f"{when}.{name}"]["value"]) for when in ("before", "after"))  # type: ignore[return-value]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--at-once", type=int, default=1, help="chains that run side by side, one thread each if several"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.at_once > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(options.at_once) as pool:
        results = list(pool.map(lambda seed: run(seed, f"{home}/{seed}"), range(options.seeds)))
    text = page(results)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def run(seed: int, home: str) -> Result:
    """One chain, in a process of its own."""
    command = [
        "align",
        "run",
        "recipes/quickstart.yaml",
        "--json",
        "--set",
        f"seed={seed}",
        "--set",
        f"name=seed-{seed}",
    ]
    done = subprocess.run(
        [Path(sys.executable).with_name("align"), *command[1:]], cwd=ROOT, check=True, stdout=subprocess.PIPE,
        env=os.environ | {"ALIGN_HOME": home},
    )  # fmt: skip
    chain = {entry["stage"]: entry.get("checkpoint") or entry.get("data") for entry in json.loads(done.stdout)}
    numbers = {
        name: made.get("metrics") or made["sft"]["info"]["stage"]["metrics"] for name, made in chain.items() if made
    }
    return Result(seed, numbers)


def page(results: Sequence[Result]) -> str:
    """The table as Markdown."""
    head = "| stage | held-out number | " + " | ".join(f"seed {result.seed}" for result in results) + " | improved |"
    lines = [INTRODUCTION, head, "|---" * (len(results) + 3) + "|"]
    for stage, (_, words) in SHOWN.items():
        pairs = [result.pair(stage) for result in results]
        cells = " | ".join(f"{before:.1%} → {after:.1%}" for before, after in pairs)
        lines.append(f"| {stage} | {words} | {cells} | {sum(a > b for b, a in pairs)} of {len(pairs)} |")
    for stage in ("aligned", "policy"):
        drift = " | ".join(f"{result.metrics[stage]['after.kl_sequence']['value']:.2f}" for result in results)
        lines.append(f"| {stage} | KL to its reference, nats per answer | {drift} | |")
    rewards = [
        [result.metrics["policy"][f"{when}.reward"]["value"] for when in ("before", "after")] for result in results
    ]
    cells = " | ".join(f"{before:.2f} → {after:.2f}" for before, after in rewards)
    lines.append(
        f"| policy | reward, of the reward model | {cells} | {sum(a > b for b, a in rewards)} of {len(rewards)} |"
    )
    lines += _loop_lines(results)
    guards = " | ".join(
        ", ".join(a["guard"] for a in result.metrics["policy"]["guards"]) or "none" for result in results
    )
    lines.append(f"| policy | guards raised | {guards} | |")
    return "\n".join(lines) + "\n"


def _loop_lines(results: Sequence[Result]) -> list[str]:
    """What the constitution's loop did: violations at least halved, right answers to what may be answered kept."""
    rates = [result.loop("violation_rate") for result in results]
    helped = [result.loop("answered_rightly") for result in results]
    refused = [result.loop("refused_wrongly") for result in results]
    goals = (
        ("answers with a violation", rates, [after <= before / 2 for before, after in rates], "halved"),
        ("right answers, of what may be answered", helped, [a > b - 0.02 for b, a in helped], "no 2 points lost"),
        ("refusals, of what may be answered", refused, [], ""),
    )
    lines = []
    for words, pairs, held, goal in goals:
        cells = " | ".join(f"{before:.1%} → {after:.1%}" for before, after in pairs)
        verdict = f"{goal} in {sum(held)} of {len(held)}" if goal else ""
        lines.append(f"| constitution | {words} | {cells} | {verdict} |")
    critics = [result.metrics["constitution.1.critique"] for result in results]
    for name, words in (
        ("precision", "the critic is right where it objects"),
        ("recall", "violations the critic finds"),
    ):
        cells = " | ".join(f"{metrics[f'before.critic.{name}']['value']:.0%}" for metrics in critics)
        lines.append(f"| constitution | {words} | {cells} | |")
    return lines


if __name__ == "__main__":
    main()
