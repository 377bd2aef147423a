"""How many useful new tokens a processor second brings, beside transformers' own `generate`?

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py --shape 15m --dtype float32

Random weights, prompts of many lengths, and a reply length drawn for each prompt (log-normal, median 45), which both
sides are made to keep to. Useful tokens are those of the replies; what a side computes beyond them is its own loss. The
sides take turns, and the median of the turns counts. Shapes and prompts come from the folder that ALIGN_SHARED names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from align.rollout import generation
from align.rollout.generation import Sampling, generate
from align.rollout.left_padded import left_padded

ROOT = Path(__file__).parents[1]
LONGEST_REPLY = 256


class Limits(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at its own number of new tokens."""

    def __init__(self, prompt_tokens: int, limits: Sequence[int]) -> None:
        self.ends = torch.tensor(limits) + prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="15m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers = shared_shapes()
    folder = peers.model_folder(options.shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    prompts = peers.prompt_rows(options.prompts, model.config.vocab_size)
    limits = reply_lengths(options.prompts)
    sides: dict[str, Callable[[], None]] = {
        "align": lambda: ours(model, AutoTokenizer.from_pretrained(folder), prompts, limits, options.batch),
        "transformers": lambda: theirs(model, prompts, limits, options.batch),
    }
    speeds = measure(sides, sum(limits), options.turns)
    report = {**vars(options), "tokens_per_cpu_second": speeds, "ratio": speeds["align"] / speeds["transformers"]}
    print(json.dumps(report, indent=2))  # noqa: T201


def shared_shapes() -> ModuleType:
    """The module with the shapes and prompts that all peers are measured on."""
    path = Path(os.environ.get("ALIGN_SHARED", ROOT.parent / "shared")) / "bench" / "peer_common.py"
    spec = importlib.util.spec_from_file_location("peer_common", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} is not there; set ALIGN_SHARED to the folder that holds bench/")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reply_lengths(rows: int) -> list[int]:
    """Log-normal with median 45 and deviation 0.8, from 4 to LONGEST_REPLY."""
    draw = random.Random(1)
    return [int(min(LONGEST_REPLY, max(4, round(math.exp(draw.gauss(math.log(45), 0.8)))))) for _ in range(rows)]


def measure(sides: dict[str, Callable[[], None]], tokens: int, turns: int) -> dict[str, float]:
    """Median tokens per processor second of each side; the sides take turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            start = time.process_time()
            run()
            found[name].append(tokens / (time.process_time() - start))
    return {name: statistics.median(speeds) for name, speeds in found.items()}


def ours(model: Any, tokenizer: Any, prompts: list[list[int]], limits: list[int], batch: int) -> None:
    """All prompts at once, with room for about as many as the other side has in a batch."""
    generation._Stopper.finishes = lambda _, row: len(row.ids) == limits[row.index]
    generation.TOKENS_AT_ONCE = batch * int(statistics.median(map(len, prompts)) + LONGEST_REPLY)
    sampling = Sampling(max_new_tokens=LONGEST_REPLY, temperature=1.0)
    replies = generate(model, tokenizer, prompts, sampling, stop_ids=[])
    assert [len(reply.ids) for reply in replies] == limits


def theirs(model: Any, prompts: list[list[int]], limits: list[int], batch: int) -> None:
    """Batch after batch, each until its last row has ended."""
    for start in range(0, len(prompts), batch):
        ids, mask, _ = left_padded(prompts[start : start + batch], torch.device("cpu"))
        ends = limits[start : start + batch]
        config = GenerationConfig(max_new_tokens=max(ends), do_sample=True, top_k=0, pad_token_id=0)
        model.generate(
            ids, attention_mask=mask, generation_config=config,
            stopping_criteria=StoppingCriteriaList([Limits(ids.shape[1], ends)]),
        )  # fmt: skip


if __name__ == "__main__":
    main()
