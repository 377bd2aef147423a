"""Rows per second of the critique stage beside plain transformers `generate`, one request at a time and in batches of 16.

    python benchmarks/critique_speed.py --out docs/critique-speed.md

Each row is an answer (sampled), a critique and a revision (greedy) in the words of a constitution. All sides run the
stage's own code and differ in the writer alone. Reply lengths are drawn once, and every side is made to keep to them; no
critique counts as "nothing found", so that all sides answer the same number of requests. The sides take turns, in
processes of their own on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.work import SHAPES, model_folder, prompt_rows

ROOT = Path(__file__).parents[1]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
LOOP, BATCHES, OURS = "transformers, one request at a time", "transformers, padded batches of 16", "align"
SIDES = {LOOP: 1, BATCHES: 16, OURS: 0}  # requests of one `generate` call
PARTS = 3  # answer, critique, revision
COMPARED = 8  # greedy critiques that are written once more by transformers


@dataclass(frozen=True)
class Load:
    """What a model is measured on. median, longest: of replies, in new tokens; log-normal with deviation 0.8."""

    title: str
    constitution: Path
    rows: int
    median: int
    longest: int


LOADS = {
    "15m": Load("15m (width 288, 6 layers, vocabulary 32,000, random weights)",
                ROOT / "data/constitutions/general.yaml", 48, 45, 256),
    "harbour": Load("the embedded harbour model (0.9 million weights)", ROOT / "data/harbour/constitution.yaml", 192, 16, 48),
}  # fmt: skip
INTRODUCTION = """# Critique beside plain `generate`

Rows per second of the critique stage's work: an answer (sampled), a critique and a revision (greedy). All sides run the
stage's own code with the same requests, and differ in who writes: transformers' `model.generate` one request at a time,
`model.generate` in padded batches of 16 in the order of the rows, or align's rollout. Reply lengths are drawn once
(log-normal), and every side keeps to them. float32, one thread, the allocator of all sides told to keep its memory.
The sides take turns in processes of their own; seconds are of the processor, as other work ran on the machine; ratios are
taken turn by turn. Peak memory is that of the process, libraries included. Made by
`python benchmarks/critique_speed.py --out docs/critique-speed.md`.
"""


def main() -> None:
    """The command line: starts the sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", nargs="*", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sys.stdout.write("RESULT " + json.dumps(run_side(options.side, options.work)) + "\n")
        return
    found = {name: compare(name, options.turns) for name in options.loads}
    text = page(found, options.turns)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def compare(name: str, turns: int, rows: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Results of every side, turn by turn. rows: fewer than the load has."""
    load = LOADS[name]
    rows = rows or load.rows
    model, prompts = material(name, rows)
    draw = random.Random(1)
    lengths = [
        [int(min(load.longest, max(4, round(load.median * math.exp(draw.gauss(0, 0.8)))))) for _ in range(rows)]
        for _ in range(PARTS)
    ]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.json"
        work.write_text(json.dumps({"load": name, "model": model, "prompts": prompts, "lengths": lengths}))
        for _ in range(turns):
            for side in SIDES:
                done = subprocess.run(
                    [sys.executable, __file__, "--side", side, "--work", work],
                    env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
                found[side].append(json.loads(line.removeprefix("RESULT ")))
                sys.stderr.write(f"{name}, {side}: {found[side][-1]}\n")
    return found


def material(name: str, rows: int) -> tuple[str, list[str]]:
    """Model folder and prompts."""
    if name == "harbour":
        lines = (ROOT / "data/harbour/prompts.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        return str(ROOT / "data/harbour/base"), [json.loads(line)["prompt"] for line in lines]
    ids = prompt_rows(rows, SHAPES[name]["vocab_size"])
    return model_folder(name), [" ".join(f"w{token}" for token in row) for row in ids]


def run_side(side: str, work: Path) -> dict[str, Any]:
    """All rows by one side, in this process."""
    import torch

    torch.set_num_threads(1)
    from align.constitution import Constitution, ConstitutionFile
    from align.critique.critics import TextCritic
    from align.critique.rows import RowFile
    from align.critique.work import Workbench
    from align.data.examples import Message, Prompt
    from align.models.source import source_of
    from align.progress import Progress
    from align.recipe.critique_settings import CritiqueWork
    from align.recipe.yaml_text import parse_yaml
    from align.stages.critique import open_writer

    class Insisting(Constitution):
        """Never content with an answer."""

        def finds_nothing(self, critique: str) -> bool:
            return False

    given = json.loads(work.read_text())
    load, lengths = LOADS[given["load"]], given["lengths"]
    text = parse_yaml(load.constitution.read_text(encoding="utf-8"), str(load.constitution))
    assert text is not None
    constitution = Insisting(ConstitutionFile.model_validate(text.plain()))
    opened, _ = open_writer(source_of(given["model"]), Progress())
    assert next(opened.model.parameters()).dtype == torch.float32
    writer = Paced(opened, SIDES[side], lengths)
    Paced(opened, SIDES[side], [[4]]).write([(Message("user", given["prompts"][0]),)], 4)  # what is made once
    settings = CritiqueWork(constitution="", check_revisions=False, max_new_tokens=load.longest)
    critic = TextCritic(writer, constitution, load.longest)
    bench = Workbench(settings, writer, critic, constitution, 0, None, Progress())
    questions = [Prompt((Message("user", prompt),)) for prompt in given["prompts"]]
    with tempfile.TemporaryDirectory() as folder:
        file = RowFile(Path(folder) / "rows.jsonl")
        began, processor = time.perf_counter(), time.process_time()
        rows = bench.rows(questions, file, "prompts")
        seconds, used = time.perf_counter() - began, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "rows_per_second": len(rows) / used, "rows_per_wall_second": len(rows) / seconds, "peak_mib": peak,
        "requests": writer.requests, "prompt_tokens": writer.prompt_tokens, "new_tokens": writer.new_tokens,
    }  # fmt: skip
    if side == OURS:
        principles = {principle.id: principle for principle in constitution.principles}
        some = rows[:COMPARED]
        asked = [constitution.critique_request(principles[r.steps[0].principle], r.prompt, r.answer) for r in some]
        again = Paced(opened, 1, [lengths[1][:COMPARED]]).write(asked, load.longest)
        result["same_critiques"] = sum(
            one.text == row.steps[0].critique for one, row in zip(again, some, strict=True)
        ) / len(some)
    return result


@dataclass
class Paced:
    """A writer whose replies end where `lengths` says: one list for each call. batch: requests of one call of
    transformers' `generate`; 0: align's rollout. writer: align's LocalWriter."""

    writer: Any
    batch: int
    lengths: Sequence[Sequence[int]]
    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    calls: int = field(default=0, init=False)

    def write(
        self, requests: Sequence[Any], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[Any]:
        """Replies of the lengths whose turn it is."""
        from align.critique.writers import Written

        lengths = self.lengths[self.calls]
        assert len(requests) == len(lengths), "every row is asked about"
        self.calls += 1
        self.requests += len(requests)
        self.new_tokens += sum(lengths)
        if self.batch:
            return [Written(text, finished=True) for text in self._plain(requests, lengths, temperature)]
        from align.rollout import generation

        generation._Stopper.finishes = lambda _, row: len(row.ids) == lengths[row.index]  # type: ignore[assignment, method-assign]
        self.prompt_tokens += sum(len(self.writer.encoder.prompt(request)) for request in requests)
        written: list[Any] = self.writer.write(requests, max_new_tokens, temperature=temperature, seed=seed)
        assert all(reply is not None and reply.finished for reply in written)
        return written

    def choose(self, requests: Sequence[Any], options: Any) -> list[float | None]:
        """Not measured."""
        raise NotImplementedError

    def _plain(self, requests: Sequence[Any], lengths: Sequence[int], temperature: float) -> list[str]:
        """Batch after batch, each until its last row has ended."""
        import torch
        from rollouts import Limits
        from transformers import GenerationConfig, StoppingCriteriaList

        from align.rollout.left_padded import left_padded

        texts = []
        for start in range(0, len(requests), self.batch):
            prompts = [self.writer.encoder.prompt(request) for request in requests[start : start + self.batch]]
            self.prompt_tokens += sum(map(len, prompts))
            ends = list(lengths[start : start + self.batch])
            ids, mask, _ = left_padded(prompts, torch.device("cpu"))
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            config = GenerationConfig(max_new_tokens=max(ends), pad_token_id=0, use_cache=True, **sampling)
            limits = StoppingCriteriaList([Limits(ids.shape[1], ends)])
            self.writer.model.generation_config = GenerationConfig()  # no stop token: lengths are given
            with torch.no_grad():
                found = self.writer.model.eval().generate(
                    ids, attention_mask=mask, generation_config=config, stopping_criteria=limits
                )[:, ids.shape[1] :]
            for row, end in zip(found.tolist(), ends, strict=True):
                texts.append(self.writer.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
        return texts


def page(found: dict[str, dict[str, list[dict[str, Any]]]], turns: int) -> str:
    """The tables as Markdown."""
    lines = [INTRODUCTION]
    for name, sides in found.items():
        load = LOADS[name]
        one = sides[OURS][0]
        lines += [
            f"## {load.title}",
            "",
            f"{load.rows} rows, so {one['requests']} requests, {one['prompt_tokens']:,} tokens of prompts and "
            f"{one['new_tokens']:,} new ones (median {load.median}, at most {load.longest} a reply); medians of {turns} "
            f"turns ({platform.processor() or platform.machine()}); constitution: {load.constitution.name}.",
            "",
            "| | rows a second | x one at a time | range of x | x batches | range of x | requests | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for side, results in sides.items():
            cells = [f"{_median(results, 'rows_per_second'):.2f}"]
            for peer in (LOOP, BATCHES):
                ratios = [
                    a["rows_per_second"] / b["rows_per_second"] for a, b in zip(results, sides[peer], strict=True)
                ]
                cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
            cells += [str(results[0]["requests"]), f"{_median(results, 'peak_mib'):,.0f}"]
            lines.append(f"| {side} | " + " | ".join(cells) + " |")
        same = statistics.mean(result["same_critiques"] for result in sides[OURS])
        lines += [
            "",
            f"Of {COMPARED} greedy critiques {same:.0%} are the same, letter for letter, when transformers writes them.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _median(results: Sequence[dict[str, Any]], name: str) -> float:
    return float(statistics.median(result[name] for result in results))


if __name__ == "__main__":
    main()
