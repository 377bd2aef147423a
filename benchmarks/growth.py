"""How do time and memory grow with the number of rows and with their length?

    OMP_NUM_THREADS=1 python benchmarks/growth.py --out docs/growth.md           # up to 100,000 rows
    OMP_NUM_THREADS=1 python benchmarks/growth.py --full --out docs/growth.md    # and a million: about an hour

Conversations of random words, one token each; their lengths are log-normal with median 80. Each step runs in a process of
its own. Time is that of the processor, workers included; memory is the peak of the process and of its workers together
(at most: Linux counts to a worker what its parent held when it began).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from peers.work import FIRST_ID, SHAPES, model_folder, say

from align.machine import this_machine

SHAPE = "1m"
ROWS = (10_000, 100_000, 1_000_000)
LENGTHS = (80, 800, 8_000)  # tokens in the middle
ROWS_OF_LENGTHS = 1_000
STEP_LENGTHS = (128, 1_280, 12_800)
LIMIT_MIB = 2048
LONGEST = 200_000  # tokens; no row is left out
NAME = "rows"

Measured = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="A million rows, too.")
    parser.add_argument("--rows", type=int, nargs="+", help="Other numbers of rows.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--value", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        say(measured(options.step, options.value))
        return
    counts = options.rows or (ROWS if options.full else ROWS[:2])
    text = page(by_rows(counts), by_length(), [step("train", length) for length in STEP_LENGTHS])
    if options.out:
        options.out.write_text(text, "utf-8")
    sys.stdout.write(text)


# Steps, each in a process of its own, in a folder that holds rows.jsonl and the registry --------------------------------


def measured(name: str, value: int) -> Measured:
    """What one step took, its imports left out of the time."""
    work = STEPS[name](value)
    began = time.process_time()
    told = work()
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() - began + workers.ru_utime + workers.ru_stime
    count = value if name == "tokenise" and value > 1 else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + count * workers.ru_maxrss
    return {"seconds": seconds, "mib": peak / 1024, **(told or {})}


def check(_: int) -> Callable[[], None]:
    """`align data check`."""
    from align.data.inspection import inspect
    from align.recipe.settings import DataSettings

    return lambda: None if inspect(DataSettings(path=f"{NAME}.jsonl"), Path()).usable else sys.exit("unusable rows")


def register(_: int) -> Callable[[], None]:
    """`align data add`."""
    from align.cli.data import add_command

    arguments = [f"{NAME}.jsonl", "--name", NAME]
    return lambda: add_command.main(arguments, standalone_mode=False) and None


def tokenise(processes: int) -> Callable[[], Measured]:
    """The training rows of the registered data, by so many processes; 0: read back."""
    from align.chat.bulk import encode_rows
    from align.chat.encoder import Encoder
    from align.chat.templates import prepare_tokenizer
    from align.data.prepared import read_prepared
    from align.models.folders import load_tokenizer
    from align.models.source import source_of
    from align.progress import Progress
    from align.registry import Registry

    tokenizer = load_tokenizer(source_of(model_folder(SHAPE)))
    prepare_tokenizer(tokenizer)
    kept = Path(f"by-{processes or 1}")

    def work() -> Measured:
        registry = Registry.open()
        rows = read_prepared(registry.data(NAME).path).train
        encoder = Encoder(tokenizer, max_length=LONGEST)
        stored = encode_rows(encoder, rows, kept, Progress(), max(processes, 1))
        return {"rows": len(stored), "tokens": encoder.lengths.as_dict()["tokens"]}

    return work


def train(length: int) -> Callable[[], None]:
    """Forward and backward pass of supervised fine-tuning on one row of that length."""
    import torch

    from align.chat.encoded import Encoded
    from align.models.loading import load_policy
    from align.models.source import source_of
    from align.stages.objectives import AnswerLoss

    torch.set_num_threads(1)
    model = load_policy(source_of(model_folder(SHAPE)), trainable=True, precision="float32")
    draw = random.Random(0)
    ids = [draw.randrange(FIRST_ID, SHAPES[SHAPE]["vocab_size"]) for _ in range(length)]

    def work() -> None:
        loss, _ = AnswerLoss()(model, [Encoded(ids, [True] * length)])
        loss.backward()

    return work


STEPS: dict[str, Callable[[int], Callable[[], Measured | None]]] = {
    "check": check, "register": register, "tokenise": tokenise, "train": train
}  # fmt: skip


def step(name: str, value: int = 0, folder: Path | None = None) -> Measured:
    """A step in a process of its own."""
    command = [sys.executable, str(Path(__file__).absolute()), "--step", name, "--value", str(value)]
    home = {"ALIGN_HOME": str(folder / "home")} if folder else {}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name} {value}: {done.stderr}")
    found: Measured = json.loads(done.stdout.rpartition("RESULT ")[2])
    sys.stderr.write(f"{name} {value}: {found}\n")
    return found


# What is compared ----------------------------------------------------------------------------------------------------


def by_rows(counts: Sequence[int]) -> list[tuple[int, dict[str, Measured]]]:
    """Each number of rows, and what every step took."""
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="align-growth-") as place:
            write_rows(Path(place) / f"{NAME}.jsonl", count, 80)
            found.append((count, steps_on(Path(place))))
    return found


def by_length() -> list[tuple[int, dict[str, Measured]]]:
    """Each median length, and what every step took for the same number of rows."""
    found = []
    for length in LENGTHS:
        with tempfile.TemporaryDirectory(prefix="align-growth-") as place:
            write_rows(Path(place) / f"{NAME}.jsonl", ROWS_OF_LENGTHS, length)
            found.append((length, steps_on(Path(place))))
    return found


def steps_on(folder: Path) -> dict[str, Measured]:
    """The steps on the rows of a folder, in the order in which a user meets them."""
    return {
        "check": step("check", folder=folder),
        "register": step("register", folder=folder),
        "tokenise, 1 process": step("tokenise", 1, folder),
        "tokenise, 2 processes": step("tokenise", 2, folder),
        "read back": step("tokenise", 0, folder),
    }


def write_rows(file: Path, count: int, median: int) -> None:
    """Conversations of one question and one answer, a quarter of the tokens in the question."""
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(FIRST_ID, SHAPES[SHAPE]["vocab_size"])]
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            length = max(4, min(20 * median, round(math.exp(draw.gauss(math.log(median), 0.7)))))
            words = draw.choices(vocabulary, k=length)
            question, answer = " ".join(words[: length // 4]), " ".join(words[length // 4 :])
            stream.write(json.dumps({"prompt": question, "completion": answer}) + "\n")


# Page ----------------------------------------------------------------------------------------------------------------


def page(
    rows: list[tuple[int, dict[str, Measured]]],
    lengths: list[tuple[int, dict[str, Measured]]],
    steps: list[Measured],
) -> str:
    """The measurements as Markdown."""
    machine, most = this_machine(), max(one["mib"] for one in rows[-1][1].values())
    count = f"{rows[-1][0]:,} rows"
    verdict = "within" if most <= LIMIT_MIB else "above"
    return "\n".join(
        [
            "# Growth",
            "",
            "Time and memory as data and length grow 10 and 100 times. Made by `python benchmarks/growth.py "
            f"{'--full ' if rows[-1][0] >= ROWS[-1] else ''}--out docs/growth.md` on {date.today().isoformat()}: "
            f"{machine.processor}, {machine.usable_cores:.0f} cores. Time is processor seconds, workers included and "
            "imports not; memory is the peak of the process, with the libraries that it imported, and of its workers "
            "together, in MiB.",
            "",
            f"The most that {count} took is {most:,.0f} MiB, {verdict} the target of {LIMIT_MIB:,} MiB.",
            "",
            "## Rows (conversations with a median of 80 tokens)",
            "",
            *table("rows", rows),
            "",
            f"## Length ({ROWS_OF_LENGTHS:,} conversations)",
            "",
            *table("tokens in the middle", lengths),
            "",
            f"## One row of supervised fine-tuning (forward and backward, {SHAPE}, float32, one thread)",
            "",
            "| tokens | s | MiB |",
            "|---|---|---|",
            *(f"| {length:,} | {one['seconds']:.2f} | {one['mib']:,.0f} |" for length, one in zip(STEP_LENGTHS, steps)),
            "",
        ]
    )


def table(head: str, found: list[tuple[int, dict[str, Measured]]]) -> list[str]:
    """One line a step, two columns a size."""
    sizes = [f"{size:,}" for size, _ in found]
    lines = [
        f"| {head} | " + " | ".join(f"{size}: s | MiB" for size in sizes) + " |",
        "|---" * (2 * len(sizes) + 1) + "|",
    ]
    for name in found[0][1]:
        cells = [f"{steps[name]['seconds']:.2f} | {steps[name]['mib']:,.0f}" for _, steps in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
