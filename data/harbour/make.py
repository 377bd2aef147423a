"""Write the harbour's data: `python data/harbour/make.py`; with `--text FILE`, text to pretrain on instead; with
`--export CHECKPOINT`, the shipped model from a pretrained checkpoint.

Everything is drawn from one seed, so the same command writes the same bytes. No prompt stands in two files, and the facts
that the held-out prompts (prompts.test.jsonl) ask for are asked for in no other: they stand in the pretraining text only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rows import Request, critique, demonstration, pair, prompt, requests, right_answer
from stories import draw_story
from tasks import BASICS, SKILLS
from vocabulary import word_counts, write_tokenizer

HERE = Path(__file__).parent
SEED = 2026
ROWS = {
    "instructions": 2000,
    "skills": 1600,
    "critiques": 500,
    "helpful": 600,
    "preferences": 1600,
    "prompts": 600,
    "prompts.test": 300,
}
MORE_CRITIQUES = 2500  # with a draw of their own, so that no other set depends on how many they are
STORIES = 26_000
VOCABULARY_TEXTS = 10_000  # enough for every word to turn up, also at the start of a sentence
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "initializer_range": 0.06,  # the usual 0.02 is made for wider models
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STORIES_IN_ONE = (1, 1, 1, 2)  # a text is this many stories


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="write stories to this JSONL file")
    parser.add_argument("--stories", type=int, default=STORIES, help="how many texts")
    parser.add_argument("--export", type=Path, help="write this checkpoint folder to data/harbour/base in bfloat16")
    options = parser.parse_args()
    if options.export:
        export(options.export, HERE / "base")
    elif options.text:
        options.text.parent.mkdir(parents=True, exist_ok=True)
        write_rows(options.text, ({"text": text} for text in texts(options.stories)))
    else:
        sets = data_sets()
        for name, rows in sets.items():
            write_rows(HERE / f"{name}.jsonl", rows)
        write_start(sets)


def texts(number: int) -> Iterator[str]:
    """Texts for pretraining."""
    rng = random.Random(SEED)
    for _ in range(number):
        yield "\n".join(draw_story(rng) for _ in range(rng.choice(STORIES_IN_ONE)))


def data_sets() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file. The held-out prompts are drawn first and kept out of the rest."""
    rng = random.Random(SEED)
    constitution = yaml.safe_load((HERE / "constitution.yaml").read_text(encoding="utf-8"))
    everything = (*BASICS, *SKILLS)
    seen: set[str] = set()
    held_out = _fresh(requests(rng, everything, held_out=True), ROWS["prompts.test"], seen)
    first = _fresh(requests(rng, BASICS), ROWS["instructions"], seen)
    second = _fresh(requests(rng, (*SKILLS, *SKILLS, *BASICS)), ROWS["skills"], seen)
    compared = _fresh(requests(rng, everything, forbidden=0.3), ROWS["preferences"], seen)
    asked = _fresh(requests(rng, everything), ROWS["prompts"], seen)
    criticised = _fresh(requests(rng, everything, forbidden=0.3), ROWS["critiques"], seen)
    sets = {
        "prompts.test": [prompt(request) for request in held_out],
        "instructions": [demonstration(rng, request) for request in first],
        "skills": [demonstration(rng, request) for request in second],
        "preferences": [pair(rng, request) for request in compared],
        "prompts": [prompt(request) for request in asked],
        "critiques": [critique(rng, request, constitution) for request in criticised],
    }
    own = random.Random(f"{SEED} critiques")
    more = _fresh(requests(own, everything, forbidden=0.3), MORE_CRITIQUES, seen)
    sets["critiques"] += [critique(own, request, constitution) for request in more]
    own = random.Random(f"{SEED} helpful")
    allowed = _fresh(requests(own, everything, forbidden=0), ROWS["helpful"], seen)
    sets["helpful"] = [right_answer(request) for request in allowed]
    return sets


def write_start(sets: Mapping[str, list[dict[str, Any]]]) -> None:
    """The folder that pretraining starts from: a tokenizer and the model's shape, no weights."""
    spoken = [text for rows in sets.values() for row in rows for text in _texts_in(row)]
    tokens = write_tokenizer(word_counts([*texts(VOCABULARY_TEXTS), *spoken]), HERE / "start")
    shape = json.dumps(SHAPE | {"vocab_size": tokens}, indent=2)
    (HERE / "start" / "config.json").write_text(shape + "\n", encoding="utf-8")


def export(checkpoint: Path, folder: Path) -> None:
    """The model of a checkpoint in bfloat16, with the tokenizer it started from: a base model has no chat template."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HERE / "start" / name, folder / name)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _fresh(drawn: Iterator[Request], number: int, seen: set[str]) -> list[Request]:
    """The next requests whose prompts nobody has seen yet."""
    kept: list[Request] = []
    for request in drawn:
        if request.prompt not in seen:
            seen.add(request.prompt)
            kept.append(request)
        if len(kept) == number:
            break
    return kept


if __name__ == "__main__":
    main()
