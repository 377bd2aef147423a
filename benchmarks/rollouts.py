"""How many useful new tokens a processor second brings, beside transformers' own `generate`?

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py --shape 15m --dtype float32

Random weights, prompts of many lengths, and a reply length drawn for each prompt (log-normal, median 45), which both
sides are made to keep to. Useful tokens are those of the replies; what a side computes beyond them is its own loss. The
sides take turns, and the median of the turns counts.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peers.work import SHAPES, model_folder, prompt_rows, say
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from align.rollout import generation
from align.rollout.generation import Sampling, generate
from align.rollout.left_padded import left_padded

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
    folder = model_folder(options.shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    prompts = prompt_rows(options.prompts, SHAPES[options.shape]["vocab_size"])
    limits = reply_lengths(options.prompts)
    sides: dict[str, Callable[[], None]] = {
        "align": lambda: ours(model, AutoTokenizer.from_pretrained(folder), prompts, limits, options.batch),
        "transformers": lambda: theirs(model, prompts, limits, options.batch),
    }
    turns = measure(sides, sum(limits), options.turns)
    speeds = {
        name: statistics.median(turn["units"] / turn["processor_seconds"] for turn in found)
        for name, found in turns.items()
    }
    ratio = speeds["align"] / speeds["transformers"]
    say({**vars(options), "turns": turns, "tokens_per_cpu_second": speeds, "ratio": ratio})


def reply_lengths(rows: int) -> list[int]:
    """Log-normal with median 45 and deviation 0.8, from 4 to LONGEST_REPLY."""
    draw = random.Random(1)
    return [int(min(LONGEST_REPLY, max(4, round(math.exp(draw.gauss(math.log(45), 0.8)))))) for _ in range(rows)]


def measure(sides: dict[str, Callable[[], None]], tokens: int, turns: int) -> dict[str, list[dict[str, float]]]:
    """Times of each side, turn by turn; the sides take turns. units: useful new tokens."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            start, processor = time.perf_counter(), time.process_time()
            run()
            seconds, used = time.perf_counter() - start, time.process_time() - processor
            found[name].append({"seconds": seconds, "processor_seconds": used, "units": tokens})
    return found


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
