"""Does a stage take the memory that `align plan` says? Real stages, each in a process of its own.

    python benchmarks/memory.py --out docs/memory.md                    # every case, and the page (about an hour)
    python benchmarks/memory.py --only sft-1m,15m --out docs/memory.md  # these cases anew, into the same page
    python benchmarks/memory.py --page --out docs/memory.md             # no run: what was measured, predicted anew

A case is a recipe of two optimiser steps on a model of random weights: `align plan` says what its stage will take, `align
run` runs it, and the kernel says the most that the process had resident. What was measured lies in a JSON file beside the
page. No torch here: a child begins with what its parent has resident.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers.work import SHAPES, instruction_rows, preference_rows, prompt_rows

from align.machine import this_machine

# cases that were looked at when LIBRARIES_BYTES, IDLE_HEAP, WRITERS_BYTES (align/estimate/place.py) and the reading of prompts
# (asking.py) were settled; the others test them
FITTED = {
    "sft-1m", "sft-1m-large", "sft-15m", "sft-15m-large", "sft-15m-one", "sft-15m-auto", "sft-15m-checkpointing", "sft-15m-ddp",
    "sft-60m", "sft-60m-auto", "sft-60m-fsdp", "sft-135m", "sft-135m-auto", "sft-135m-checkpointing",
    "lora-1m", "lora-15m", "lora-15m-large", "lora-15m-auto", "lora-60m-auto", "lora-135m-auto", "lora-135m-checkpointing",
    "nf4-15m", "dpo-1m", "dpo-15m", "dpo-15m-auto", "dpo-60m-lora", "reward-1m", "reward-15m", "reward-60m-lora",
    "ppo-1m-models", "ppo-15m-models", "ppo-15m-adapters", "ppo-15m-trunk", "critique",
}  # fmt: skip
WITHIN = 0.15  # the promise: error of the prediction, as a share of what is measured
LIBRARIES = ("align", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")
UNTIED = {**SHAPES["15m"], "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
          "intermediate_size": 1408, "tie_word_embeddings": False}  # fmt: skip
MODELS: Mapping[str, Mapping[str, Any]] = {**SHAPES, "60m": UNTIED}
LORA = {"adapter": {"kind": "lora", "rank": 16}}
NF4, INT8 = {**LORA, "quantize": "nf4"}, {**LORA, "quantize": "int8"}
FLOAT32, CHECKPOINTED = {"precision": "float32"}, {"gradient_checkpointing": True}
PLAN_THERE = """
import dataclasses, json, sys
from align.cli.main import main
from align.estimate import place

here, there = place.this_machine(), json.loads(sys.argv.pop(1))
place.this_machine = lambda: dataclasses.replace(here, features=tuple(there))
main()
"""
HARBOUR = Path(__file__).parents[1] / "data/harbour"  # the embedded model, with prompts that it knows
MAKE = """
import json, sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from align.chat.templates import prepare_tokenizer

shape, folder = json.loads(sys.argv[1]), sys.argv[2]
names = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, shape["vocab_size"])]
words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
prepare_tokenizer(tokenizer)  # a base that can chat: else every stage would first grow its vocabulary
torch.manual_seed(0)
config = {"tie_word_embeddings": True, **shape, "vocab_size": len(tokenizer)}
LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1,
                             eos_token_id=2)).save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""


@dataclass(frozen=True)
class Case:
    """One measured stage. stages: of the recipe, the last of which is measured; the others are run before."""

    key: str
    shape: str
    stages: Mapping[str, Mapping[str, Any]]
    rows: int = 160
    evaluation: Mapping[str, Any] = field(default_factory=lambda: {"rows": 24, "max_new_tokens": 32})
    launch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Name of the stage that is measured."""
        return list(self.stages)[-1]


def trained(key: str, kind: str, shape: str, tokens: int, batch: int = 64, **more: Any) -> Case:
    """A stage that trains on rows, two steps of `batch` rows in micro-batches of `tokens`."""
    case = {name: more.pop(name) for name in ("rows", "evaluation", "launch") if name in more}
    data = "pairs" if kind in ("dpo", "reward") else "chats"
    stage = {"kind": kind, "data": data, "batch_size": batch, "batch_tokens": tokens, "max_steps": 2, **more}
    return Case(key, shape, {kind: stage}, **case)


def ppo(key: str, shape: str, tokens: int, reward: Mapping[str, Any], **more: Any) -> Case:
    """Two rounds against a reward model that a stage before has trained."""
    scorer = {"kind": "reward", "data": "pairs", "batch_size": 8, "max_steps": 1, **reward}
    policy = {
        "kind": "ppo", "prompts": "prompts", "reward": "reward", "batch_size": 32, "rollouts": 32, "rounds": 2,
        "round_epochs": 1, "max_new_tokens": 48, "batch_tokens": tokens, **more,
    }  # fmt: skip
    return Case(key, shape, {"reward": scorer, "ppo": policy})


def critique(key: str, **more: Any) -> Case:
    """Answers, critiques and revisions of 60 prompts by the embedded model: one of random weights never ends an answer."""
    stage = {
        "kind": "critique", "prompts": "prompts", "constitution": "constitution.yaml", "max_new_tokens": 40,
        "keep_faultless": True, **more,
    }  # fmt: skip
    return Case(key, "harbour", {"critique": stage})


CASES = [
    trained("sft-1m", "sft", "1m", 1024),
    trained("sft-1m-large", "sft", "1m", 8192, evaluation={}, rows=400),
    trained("sft-15m", "sft", "15m", 2048, **FLOAT32),
    trained("sft-15m-large", "sft", "15m", 8192, batch=84, rows=220, **FLOAT32),
    trained("sft-15m-one", "sft", "15m", 8192, batch=16, **FLOAT32),
    trained("sft-15m-auto", "sft", "15m", 4096),
    trained("sft-15m-checkpointing", "sft", "15m", 8192, batch=84, rows=220, **FLOAT32, **CHECKPOINTED),
    trained("sft-60m", "sft", "60m", 2048, batch=32, **FLOAT32),
    trained("sft-60m-auto", "sft", "60m", 2048, batch=32),
    trained("sft-135m", "sft", "135m", 1024, batch=16, **FLOAT32),
    trained("sft-135m-auto", "sft", "135m", 2048, batch=24),
    trained("sft-135m-checkpointing", "sft", "135m", 2048, batch=24, **CHECKPOINTED),
    trained("lora-1m", "sft", "1m", 4096, **LORA),
    trained("lora-15m", "sft", "15m", 2048, **FLOAT32, **LORA),
    trained("lora-15m-large", "sft", "15m", 8192, batch=84, rows=220, **FLOAT32, **LORA),
    trained("lora-15m-auto", "sft", "15m", 4096, **LORA),
    trained("lora-60m-auto", "sft", "60m", 4096, batch=40, **LORA),
    trained("lora-135m-auto", "sft", "135m", 2048, batch=24, **LORA),
    trained("lora-135m-checkpointing", "sft", "135m", 2048, batch=24, **LORA, **CHECKPOINTED),
    trained("nf4-15m", "sft", "15m", 2048, **FLOAT32, **NF4),
    trained("nf4-15m-auto", "sft", "15m", 4096, **NF4),
    trained("nf4-135m-auto", "sft", "135m", 2048, batch=24, **NF4),
    trained("int8-15m", "sft", "15m", 2048, **FLOAT32, **INT8),
    trained("int8-60m-auto", "sft", "60m", 2048, batch=32, **INT8),
    trained("dpo-1m", "dpo", "1m", 4096),
    trained("dpo-15m", "dpo", "15m", 2048, batch=32, **FLOAT32),
    trained("dpo-15m-auto", "dpo", "15m", 4096, batch=32),
    trained("dpo-60m-lora", "dpo", "60m", 4096, batch=32, **LORA),
    trained("dpo-135m-lora", "dpo", "135m", 2048, batch=16, **LORA),
    trained("reward-1m", "reward", "1m", 4096),
    trained("reward-15m", "reward", "15m", 4096, batch=32, **FLOAT32),
    trained("reward-60m-lora", "reward", "60m", 4096, batch=32, **LORA),
    ppo("ppo-1m-models", "1m", 4096, {}),
    ppo("ppo-15m-models", "15m", 2048, {}, **FLOAT32),
    ppo("ppo-15m-adapters", "15m", 2048, LORA, **FLOAT32, **LORA),
    ppo("ppo-15m-trunk", "15m", 2048, LORA, **FLOAT32, **LORA, value="trunk"),
    ppo("ppo-15m-nf4", "15m", 2048, NF4, **FLOAT32, **NF4),
    ppo("ppo-60m-adapters", "60m", 2048, LORA, **LORA),
    critique("critique"),
    critique("critique-compared", samples=4),
    trained("sft-15m-ddp", "sft", "15m", 2048, **FLOAT32, launch={"processes": 2}),
    trained("sft-60m-fsdp", "sft", "60m", 2048, batch=32, **FLOAT32, launch={"processes": 2, "strategy": "fsdp"}),
]


def main() -> None:
    """The command line. Exits with 1 when a prediction is off by more than WITHIN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases, separated by commas: a key, or a part of keys")
    parser.add_argument("--page", action="store_true", help="run nothing; predict anew what was measured before")
    parser.add_argument("--out", type=Path, default=Path("docs/memory.md"))
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted = [part for part in options.only.split(",") if part]
    for case in CASES:
        if not options.page and (not wanted or any(part in case.key for part in wanted)):
            known[case.key] = measured(case)
            sys.stderr.write(f"{case.key}: {known[case.key]}\n")
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    cases = [case for case in CASES if case.key in known]
    predicted = {case.key: prediction(case, known[case.key]["features"]) for case in cases}
    options.out.write_text(page(cases, known, predicted), encoding="utf-8")
    sys.exit(any(abs(error(predicted[case.key], known[case.key]["bytes"])) > WITHIN for case in cases))


def measured(case: Case) -> dict[str, Any]:
    """Peak resident bytes of the process that runs the stage, seconds, and what it ran on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(case, folder)
        for stage in list(case.stages)[:-1]:
            align(folder, "run", str(recipe), "--stage", stage)
        began = time.perf_counter()
        peak = align(folder, "run", str(recipe), "--stage", case.stage)
        machine = this_machine()
        return {
            "bytes": peak, "seconds": round(time.perf_counter() - began, 1), "date": date.today().isoformat(),
            "processor": machine.processor, "features": list(machine.features),
            "versions": {library: version(library) for library in LIBRARIES},
        }  # fmt: skip


def prediction(case: Case, features: Sequence[str]) -> int:
    """What `align plan` says of the stage on a processor with these features, in a registry that knows nothing yet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(case, folder)
        plan = [sys.executable, "-c", PLAN_THERE, json.dumps(features), "plan", str(recipe), "--json"]
        done = subprocess.run(plan, env=environment(folder), check=True, stdout=subprocess.PIPE, text=True)
        return next(int(row["peak_memory_bytes"]) for row in json.loads(done.stdout) if row["name"] == case.stage)


def align(folder: Path, *arguments: str) -> int:
    """Runs a command of align; returns the most bytes that it, or a process that it started, had resident."""
    said = (folder / "said").open("w")
    process = subprocess.Popen(command(*arguments), env=environment(folder), stdout=said, stderr=said)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError((folder / "said").read_text())
    return usage.ru_maxrss * 1024


def command(*arguments: str) -> list[str]:
    """The command line of align, as its entry point would run it."""
    return [sys.executable, "-c", "from align.cli.main import main; main()", *arguments]


def environment(folder: Path) -> dict[str, str]:
    """A registry of the case's own; one thread."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "ALIGN_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}


def write_recipe(case: Case, folder: Path) -> Path:
    """The recipe of a case with its data."""
    if case.shape == "harbour":
        return _written(case, folder, {"prompts": _lines(HARBOUR / "prompts.jsonl")[:75]})
    draw = random.Random(0)
    vocabulary = MODELS[case.shape]["vocab_size"]
    chats = [_chat(ids, draw) for ids in instruction_rows(case.rows, vocabulary)]
    pairs = [{part: _text(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
             for row in preference_rows(case.rows, vocabulary)]  # fmt: skip
    prompts = [{"prompt": _text(ids)} for ids in prompt_rows(case.rows, vocabulary)]
    return _written(case, folder, {"chats": chats, "pairs": pairs, "prompts": prompts})


def _written(case: Case, folder: Path, rows_by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    for name, rows in rows_by_name.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copyfile(HARBOUR / "constitution.yaml", folder / "constitution.yaml")
    data = {name: {"path": f"{name}.jsonl", "test_fraction": 0.2} for name in rows_by_name}
    recipe = {
        "name": "memory", "model": model_folder(case.shape), "data": data, "stages": case.stages,
        "evaluation": case.evaluation, "launch": case.launch,
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return file


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _chat(ids: Sequence[int], draw: random.Random) -> dict[str, Any]:
    """A row as a question, a third of it more or less, and its answer."""
    cut = max(1, int(len(ids) * draw.uniform(0.2, 0.5)))
    turns = zip(("user", "assistant"), (ids[:cut], ids[cut:]), strict=True)
    return {"messages": [{"role": role, "content": _text(part)} for role, part in turns]}


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def model_folder(shape: str) -> str:
    """Folder of a Llama of that shape with random weights and a tokenizer of as many words; made once."""
    if shape == "harbour":
        return str(HARBOUR / "base")
    home = Path(os.environ.get("BENCH_CACHE", Path(tempfile.gettempdir()) / "align-memory"))
    folder = home / shape
    if not (folder / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, "-c", MAKE, json.dumps(dict(MODELS[shape])), str(folder)], check=True)
    return str(folder)


def error(predicted: int, measured: int) -> float:
    """Above 0: more was predicted than was taken."""
    return predicted / measured - 1


def page(cases: Sequence[Case], known: Mapping[str, Any], predicted: Mapping[str, int]) -> str:
    """The table as Markdown."""
    errors = [error(predicted[case.key], known[case.key]["bytes"]) for case in cases]
    missed = [case.key for case, off in zip(cases, errors, strict=True) if abs(off) > WITHIN]
    machines = sorted({f"{row['processor']} ({', '.join(row['features'])})" for row in known.values()})
    versions = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in known.values()})
    lines = [
        "# Memory: what `align plan` predicts, and what is taken",
        "",
        "Made by `python benchmarks/memory.py --out docs/memory.md`. Each row is a stage of a recipe of its own, run by "
        "`align run` in a process of its own: two optimiser steps (two rounds of ppo) with held-out measurements before, "
        "between and after, and the checkpoint saved. Predicted is what `align plan` says of that recipe on such a "
        "processor before anything is known of it but its files; measured is the peak resident memory that the kernel "
        "reports. The promise is an "
        f"error of at most {WITHIN:.0%}: {len(cases) - len(missed)} of {len(cases)} cases hold it, the mean absolute error "
        f"is {sum(map(abs, errors)) / len(errors):.1%}, the largest {max(map(abs, errors)):.1%}.",
        "",
        f"Machine: {'; '.join(machines)}. One thread. {'; '.join(versions)}.",
        "",
        "| case | model | settings | predicted MiB | measured MiB | error | |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, off in zip(cases, errors, strict=True):
        mark = ("**missed**" if case.key in missed else "holds") + (", fitted" if case.key in FITTED else "")
        sizes = f"{predicted[case.key] / 2**20:,.0f} | {known[case.key]['bytes'] / 2**20:,.0f}"
        lines.append(
            f"| {case.key} | {case.shape} | {_settings(case, known[case.key]['features'])} | {sizes} | {off:+.1%} | {mark} |"
        )
    not_run = [case.key for case in CASES if case.key not in known]
    if not_run:
        lines += ["", f"Not run yet, of the {len(CASES)} cases of the script: {', '.join(not_run)}."]
    return "\n".join([*lines, "", *LEFT_OUT, ""])


def _settings(case: Case, features: Sequence[str]) -> str:
    """What of the settings decides memory; the arithmetic as it was on a processor with these features."""
    stage = case.stages[case.stage]
    said = [f"{stage['batch_tokens']:,} tokens at once"] if "batch_tokens" in stage else []
    auto = "bfloat16" if any("bf16" in feature for feature in features) else "float32"
    said += [str(stage.get("precision", auto))]
    said += ["LoRA"] if "adapter" in stage else []
    said += [str(stage[key]) for key in ("quantize",) if key in stage]
    said += ["gradient checkpointing"] if stage.get("gradient_checkpointing") else []
    said += [f"value: {stage['value']}"] if "value" in stage else []
    said += [f"{case.launch['processes']} processes, {case.launch.get('strategy', 'ddp')}"] if case.launch else []
    return ", ".join(said)


LEFT_OUT = [
    "Models: " + "; ".join(
        f"{name}: {size['num_hidden_layers']} layers, {size['hidden_size']} wide, vocabulary {size['vocab_size']:,}"
        for name, size in MODELS.items()
    ) + ". Weights are random, so every answer is as long as it may be.",
    "",
    "Resident memory is more than what is in use: freed memory is kept by the allocator, in gaps between blocks of several "
    "sizes. How much that is cannot be counted; it is fitted to the rows marked so (`IDLE_HEAP` in "
    "align/estimate/place.py), and the others test it. All else is counted: weights, gradients, the optimiser's state, what "
    "autograd keeps of each token (held against autograd itself by tests/test_estimate.py), logits, caches. It holds for the "
    "allocator as `align` sets it (align/allocator.py); with `ALIGN_ALLOCATOR=system`, or without glibc, the gaps are others.",
    "",
    "Not measured: any GPU (there the prediction is of the GPU's memory alone, and its rules have not met one), models of "
    "more than 135 million weights, architectures other than Llama's, vLLM, `adamw_8bit`, more than two processes.",
]  # fmt: skip


if __name__ == "__main__":
    main()
