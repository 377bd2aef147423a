"""The work that align and its peers are given: models of random weights, rows of random tokens, and a clock for the steps.

Throughput depends on shapes and lengths, not on what the tokens say, but losses can only be compared where they move. So
tokens are drawn unevenly (a model learns within a few steps which are frequent), and chosen replies have frequent tokens
and rejected ones have rare ones. Lengths are those that users train on: instruction rows are log-normal with median 80 and
a tail to 1,024; pairs have a prompt (median 95) and two replies (median 45 each); PPO prompts have median 48.

Imported in the peers' own environments: nothing of align here.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHAPES: dict[str, dict[str, int]] = {
    "1m": {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 344, "vocab_size": 4096,
    },
    "15m": {
        "hidden_size": 288, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
        "intermediate_size": 768, "vocab_size": 32000,
    },
    "135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152,
    },
}  # fmt: skip
FIRST_ID = 3  # those below are <pad>, <s> and </s>
LONGEST = 1024


def model_folder(shape: str) -> str:
    """Folder of a Llama of that shape with random weights (seed 0) and a tokenizer with as many ids; made once."""
    home = Path(os.environ.get("BENCH_CACHE", Path(tempfile.gettempdir()) / "align-bench"))
    folder = home / shape
    if (folder / "tokenizer_config.json").exists():
        return str(folder)
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    names = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(FIRST_ID, SHAPES[shape]["vocab_size"])]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)
    return str(folder)


def instruction_rows(rows: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Rows of which every token is trained."""
    draw = random.Random(seed)
    return [_ids(draw, _length(draw, 80, 0.8, 12, LONGEST), vocabulary) for _ in range(rows)]


def preference_rows(rows: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(rows):
        prompt, chosen, rejected = (_length(draw, *shape) for shape in ((95, 0.9, 8, 896), *2 * [(45, 0.8, 4, 128)]))
        pairs.append(
            {
                "prompt_ids": _ids(draw, prompt, vocabulary),
                "chosen_ids": _ids(draw, chosen, vocabulary),
                "rejected_ids": _ids(draw, rejected, vocabulary, skew=0.25),
            }
        )
    return pairs


def prompt_rows(rows: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts for generation."""
    draw = random.Random(seed)
    return [_ids(draw, _length(draw, 48, 0.6, 8, 192), vocabulary) for _ in range(rows)]


def _length(draw: random.Random, median: float, deviation: float, low: int, high: int) -> int:
    return int(min(high, max(low, round(math.exp(draw.gauss(math.log(median), deviation))))))


def _ids(draw: random.Random, count: int, vocabulary: int, skew: float = 4.0) -> list[int]:
    """Above 1, `skew` favours low ids; below, high ones."""
    return [FIRST_ID + int((vocabulary - FIRST_ID) * draw.random() ** skew) for _ in range(count)]


def training_flops(shape: str, lengths: Sequence[int]) -> float:
    """Operations that training on rows of these lengths takes: three times a forward pass, the causal half of attention,
    nothing for padding or for what is computed twice."""
    size = SHAPES[shape]
    width, layers = size["hidden_size"], size["num_hidden_layers"]
    keys = width * size["num_key_value_heads"] // size["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * size["intermediate_size"])
    weights += width * size["vocab_size"]
    return float(6 * weights * sum(lengths) + 6 * layers * width * sum(n * n for n in lengths))


class StepClock:
    """Time, tokens and losses of optimiser steps, the first `warmup` of which are not timed."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self._start = self._end = (0.0, 0.0)

    def step_begins(self, tokens: int) -> None:
        """tokens: real ones, no padding."""
        if len(self.tokens) == self.warmup:
            self._start = (time.perf_counter(), time.process_time())
        self.tokens.append(tokens)

    def training_ends(self) -> None:
        """After the last optimiser step."""
        self._end = (time.perf_counter(), time.process_time())

    def result(self) -> dict[str, Any]:
        """Of the timed steps; losses: of all steps. Peak memory is that of the process."""
        (wall, processor), (wall_end, processor_end) = self._start, self._end
        return {
            "seconds": wall_end - wall,
            "processor_seconds": processor_end - processor,
            "units": sum(self.tokens[self.warmup :]),
            "steps": len(self.tokens) - self.warmup,
            "losses": self.losses,
            "peak_mib": peak_mib(),
        }


def peak_mib() -> float:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_work(path: str) -> dict[str, Any]:
    """What bench.py wrote down for both sides."""
    work: dict[str, Any] = json.loads(Path(path).read_text())
    return work


def say(result: dict[str, Any]) -> None:
    """The one line that bench.py reads."""
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")
