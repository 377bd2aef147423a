"""A tokenizer with more tokens than its model is warned of, but not the tokens that training here has added."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from align.model_checks import model_warnings
from align.models.folders import load_tokenizer
from align.models.source import source_of
from tests.step_kit import Heard
from tests.test_run import Bench, bench_in

MORE = [f"<|{number}|>" for number in range(20)]


@pytest.fixture
def small(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has 20 tokens too many."""
    folder = tmp_path / "small"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    tokenizer = load_tokenizer(source_of(tiny_llama))
    tokenizer.add_tokens(MORE)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_that_have_to_be_made_up_are_said_once_by_a_check_and_by_the_run(small: Path, tmp_path: Path) -> None:
    bench: Bench = bench_in(tmp_path, small)
    rows = AutoModelForCausalLM.from_pretrained(small).config.vocab_size
    (said,) = model_warnings(bench.workshop())
    assert said.startswith(f"{small}: its tokenizer has {rows + 20} tokens and the model knows {rows}; the rows of the")
    assert "other 20 are made up" in said
    heard = Heard()
    bench.run(progress=heard, stages=["sft"])
    assert [note for note in heard.notes if "tokenizer" in note] == [f"warning: {said}"]


@pytest.mark.parametrize("first", ["whole", "adapter"])
def test_tokens_that_training_here_adds_are_not_warned_of(first: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The tiny model's template adds some, which lie in the checkpoint of all weights, or in the adapter alone."""
    bench: Bench = bench_in(tmp_path, tiny_llama)
    way = "" if first == "whole" else ", adapter: {kind: lora, rank: 4}"
    sft, aligned = f"{{kind: sft, data: talk{way}}}", "{kind: dpo, from: sft, data: pairs}"
    heard = Heard()
    bench.run(f"stages={{sft: {sft}, aligned: {aligned}}}", progress=heard)
    made = bench.workshop().registry.checkpoint("harbour/aligned")
    tokens, rows = len(load_tokenizer(source_of(made.path))), len(load_tokenizer(source_of(tiny_llama)))
    assert tokens > rows
    assert [note for note in heard.notes if "tokenizer" in note] == []
    assert model_warnings(bench.workshop(f"model={made.path}")) == []


def test_a_model_with_spare_rows_is_not_warned_of(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "roomy"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    model.save_pretrained(folder)
    load_tokenizer(source_of(tiny_llama)).save_pretrained(folder)
    assert model_warnings(bench_in(tmp_path, folder).workshop()) == []
