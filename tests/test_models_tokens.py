"""Tokens that a template adds are trained, saved, merged and read back, with tied embeddings and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from align.errors import AlignError
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.merging import materialize
from align.models.saving import save_checkpoint
from align.models.source import source_of
from tests.test_models_training import IDS, WAYS, save


def tokens_trained(make: Callable[..., Any], base: Path, folder: Path, **way: Any) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(source_of(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    model = make(source_of(base), trainable=True, tokenizer=tokenizer, **way)
    added = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])
    ids = IDS.clone()
    ids[:, ::3], ids[:, 1::3] = added
    before = logits_of(model, ids)
    rows = model.get_input_embeddings()(torch.tensor(added)).detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (logits_of(model, ids) - before).abs().max() > 1e-3
    assert (model.get_input_embeddings()(torch.tensor(added)) != rows).float().mean() > 0.9, "their rows must move"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    save_checkpoint(model, tokenizer, folder)
    return model, ids


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with tied or separate embeddings."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, tie_word_embeddings=request.param)
    if not request.param:
        torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    model.save_pretrained(folder)
    load_tokenizer(source_of(tiny_llama)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["full", "lora", "nf4"])
def test_added_tokens_are_trained_and_survive_saving(base: Path, tmp_path: Path, way: str) -> None:
    model, ids = tokens_trained(load_policy, base, tmp_path / "saved", **WAYS[way])
    again: Any = load_policy(source_of(tmp_path / "saved"))
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=1e-5, rtol=0)
    tokenizer = load_tokenizer(source_of(tmp_path / "saved"))
    assert again.get_input_embeddings().weight.shape[0] == len(tokenizer) == len(load_tokenizer(source_of(base))) + 2
    assert again.get_output_embeddings().weight.shape[0] == len(tokenizer)


@pytest.mark.parametrize("way", ["lora", "nf4"])
def test_added_tokens_survive_the_merge(base: Path, tmp_path: Path, way: str) -> None:
    model, ids = tokens_trained(load_policy, base, tmp_path / "saved", **WAYS[way])
    materialize(source_of(tmp_path / "saved"), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(plain, ids), logits_of(model, ids), atol=1e-4, rtol=0)
    assert plain.config.tie_word_embeddings == AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings


def test_plain_peft_opens_an_adapter_with_added_tokens(base: Path, tmp_path: Path) -> None:
    model, ids = tokens_trained(load_policy, base, tmp_path / "saved", **WAYS["lora"])
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(len(load_tokenizer(source_of(tmp_path / "saved"))))
    plain = PeftModel.from_pretrained(plain, tmp_path / "saved")
    torch.testing.assert_close(logits_of(plain, ids), logits_of(model, ids), atol=1e-5, rtol=0)


def test_a_vocabulary_larger_than_the_tokenizer_never_shrinks(tmp_path: Path, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(384)
    model.save_pretrained(tmp_path / "roomy")
    load_tokenizer(source_of(tiny_llama)).save_pretrained(tmp_path / "roomy")
    trained, ids = tokens_trained(load_policy, tmp_path / "roomy", tmp_path / "saved", **WAYS["lora"])
    again: Any = load_policy(source_of(tmp_path / "saved"))
    assert again.get_input_embeddings().weight.shape[0] == 384
    torch.testing.assert_close(logits_of(again, ids), logits_of(trained, ids), atol=1e-5, rtol=0)
    spare = [name for name, p in trained.named_parameters() if "trainable_tokens" in name and p.requires_grad]
    assert spare, "tokens in spare rows of the embeddings train too"


def test_added_tokens_train_in_float32_on_a_bfloat16_base(base: Path, tmp_path: Path) -> None:
    tokens_trained(load_policy, base, tmp_path / "saved", **WAYS["lora"], precision="bfloat16")


def test_a_head_with_a_bias_takes_new_tokens_only_when_all_weights_train(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = PhiConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=len(tiny_tokenizer),
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    tiny_tokenizer.save_pretrained(tmp_path / "phi")
    tokenizer = load_tokenizer(source_of(tmp_path / "phi"))
    tokenizer.add_tokens(["<|turn|>"])
    with pytest.raises(AlignError, match="head with a bias"):
        load_policy(source_of(tmp_path / "phi"), trainable=True, tokenizer=tokenizer, **WAYS["lora"])
    model, ids = tokens_trained(load_policy, tmp_path / "phi", tmp_path / "saved")
    torch.testing.assert_close(
        logits_of(load_policy(source_of(tmp_path / "saved")), ids), logits_of(model, ids), atol=1e-5, rtol=0
    )


def test_tokens_added_after_an_adapter_began_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS["lora"])
    saved = source_of(save(model, tmp_path / "saved", tiny_llama))
    tokenizer = load_tokenizer(saved)
    tokenizer.add_tokens(["<|late|>"])
    with pytest.raises(AlignError, match="1 tokens were added"):
        load_policy(saved, trainable=True, tokenizer=tokenizer)
