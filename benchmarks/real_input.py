"""The chain on real data and a small pretrained model: ALIGN_SHARED=FOLDER python benchmarks/real_input.py

Runs benchmarks/real-input.yaml in a registry of its own, runs it again with one DPO setting changed, opens every
checkpoint with plain transformers and peft, and prints the numbers. Needs the folder with the real data (ALIGN_SHARED,
default: `shared` beside the project).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("ALIGN_SHARED", ROOT.parent / "shared"))
PATHS = {
    "model": "models/stories260K",
    "data.instructions.path": "data/instruct/instructions.jsonl",
    "data.tone.path": "data/preference/tone.jsonl",
    "data.harmless.path": "data/preference/hh_harmless_1300.jsonl.gz",
}


def main() -> None:
    """The command line."""
    if not SHARED.is_dir():
        sys.exit(f"no real data at {SHARED}: set ALIGN_SHARED")
    with tempfile.TemporaryDirectory() as home:
        chain = align(home)
        for entry in chain:
            say(entry)
        again = align(home, "--set", "stages.aligned.beta=0.2")
        sys.stdout.write(
            "with beta 0.2: " + ", ".join(f"{e['checkpoint']['stage']} {e['action']}" for e in again) + "\n"
        )
        plain(chain)


def align(home: str, *more: str) -> list[dict[str, Any]]:
    """What `align run` says, as JSON."""
    settings = [part for key, path in PATHS.items() for part in ("--set", f"{key}={SHARED / path}")]
    command = [Path(sys.executable).with_name("align"), "run", "benchmarks/real-input.yaml", "--json", *settings, *more]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, env=os.environ | {"ALIGN_HOME": home})
    return list(json.loads(done.stdout))


def say(entry: dict[str, Any]) -> None:
    """One stage's numbers, with their intervals."""
    sys.stdout.write(f"{entry['checkpoint']['stage']} ({entry['checkpoint']['kind']})\n")
    for name, value in entry["checkpoint"]["metrics"].items():
        if isinstance(value, dict) and "low" in value:
            sys.stdout.write(
                f"  {name:32} {value['value']:9.4f}  [{value['low']:.4f}, {value['high']:.4f}]  n {value['n']}\n"
            )
        elif not isinstance(value, dict | list):
            sys.stdout.write(f"  {name:32} {value}\n")


def plain(chain: list[dict[str, Any]]) -> None:
    """Every checkpoint opened without align; the likelihood of one sentence under each."""
    import torch
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # what align_adapter.json says the adapter was trained on
    paths = {entry["checkpoint"]["stage"]: entry["checkpoint"]["path"] for entry in chain}
    for entry in chain:
        stage, kind, path = (entry["checkpoint"][key] for key in ("stage", "kind", "path"))
        ids = AutoTokenizer.from_pretrained(path)("Once upon a time there was a boat.", return_tensors="pt")
        if kind == "reward":
            score = AutoModelForSequenceClassification.from_pretrained(path).eval()(**ids).logits.item()
            sys.stdout.write(f"plain transformers, {stage}: reward {score:.4f}\n")
            continue
        if kind == "adapter":
            base = AutoModelForCausalLM.from_pretrained(paths["sft"], quantization_config=nf4, dtype=torch.float32)
            for module in base.modules():  # bitsandbytes 0.50.2 breaks such layers on processors with AVX-512 bf16
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
            model = PeftModel.from_pretrained(base, path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path)
        loss = model.eval()(**ids, labels=ids["input_ids"]).loss.item()
        sys.stdout.write(f"plain transformers{' and peft' if kind == 'adapter' else ''}, {stage}: loss {loss:.4f}\n")


if __name__ == "__main__":
    main()
