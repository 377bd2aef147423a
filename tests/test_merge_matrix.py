"""Every adapter on every base, tied or not, with tokens added or not: merged, within its bound, and the base chosen right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.merging import materialize, merge
from align.models.source import source_of
from tests.test_models_tokens import base, logits_of, tokens_trained
from tests.test_models_training import IDS, WAYS, save, train

__all__ = ["base"]
ADAPTERS = [way for way in WAYS if way not in ("full", "gaussian")]
HALF = {"bfloat16-dora"}


def trained(base: Path, folder: Path, way: str, *, added: bool) -> torch.Tensor:
    """Saves what was trained on `base`; its logits."""
    if added:
        model, ids = tokens_trained(load_policy, base, folder, **WAYS[way])
        return logits_of(model, ids)
    model = load_policy(source_of(base), trainable=True, **WAYS[way])
    train(model, steps=8, rate=1e-2)
    save(model, folder, base)
    return logits_of(model, IDS)


@pytest.mark.slow
@pytest.mark.parametrize("added", [False, True], ids=["same tokens", "added tokens"])
@pytest.mark.parametrize("way", ADAPTERS)
def test_a_merge_is_within_its_bound_and_says_into_what(way: str, added: bool, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", way, added=added)
    adapter = source_of(tmp_path / "adapter")
    verdict = merge(adapter, tmp_path / "merged", rows=IDS.tolist())
    assert verdict.holds
    assert verdict.kl < (1e-3 if way in HALF else 1e-6)
    assert verdict.into == ("dequantized" if adapter.quantize else "original")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.tie_word_embeddings == AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    assert plain.get_input_embeddings().weight.shape[0] == len(load_tokenizer(adapter))
    if adapter.quantize:
        assert merge(adapter, tmp_path / "original", rows=IDS.tolist(), into="original").kl > 10 * verdict.kl


@pytest.mark.slow
@pytest.mark.parametrize("added", [False, True], ids=["same tokens", "added tokens"])
def test_a_whole_model_is_its_own_plain_form(added: bool, base: Path, tmp_path: Path) -> None:
    expected = trained(base, tmp_path / "model", "full", added=added)
    source = source_of(tmp_path / "model")
    assert materialize(source, tmp_path / "unused") is source
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.config.tie_word_embeddings == AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    if not added:
        torch.testing.assert_close(logits_of(plain, IDS), expected, atol=1e-4, rtol=0)
