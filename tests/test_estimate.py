"""Predicted memory: parameters are counted exactly for Llama-like shapes, and every saving shows."""

from __future__ import annotations

from pathlib import Path

from align.estimate import LIBRARIES_BYTES, Shape, estimate
from align.recipe.settings import AdapterSettings, SftSettings

LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def settings(**changes) -> SftSettings:
    return SftSettings.model_validate({"kind": "sft", "data": "x", "batch_tokens": 1024} | changes)


def memory(**changes) -> int:
    return estimate(settings(**changes), Shape.of(LLAMA_8B), None, half=True).peak_memory_bytes or 0


def test_parameters_are_those_of_the_real_model(tiny_llama: Path) -> None:
    import json

    from transformers import AutoModelForCausalLM

    shape = Shape.of(json.loads((tiny_llama / "config.json").read_text()))
    assert shape is not None
    assert shape.parameters == AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()


def test_llama_8b_has_its_published_number_of_parameters() -> None:
    shape = Shape.of(LLAMA_8B)
    assert shape is not None
    assert shape.parameters == 8_030_261_248  # the model card's 8.03 billion


def test_each_saving_lowers_the_estimate() -> None:
    adapter = {"kind": "lora", "rank": 16}
    full, lora, qlora = memory(), memory(adapter=adapter), memory(adapter=adapter, quantize="nf4")
    checkpointed = memory(adapter=adapter, quantize="nf4", gradient_checkpointing=True)
    assert full > 120e9 > lora > qlora > checkpointed > LIBRARIES_BYTES


def test_an_adapter_on_every_linear_layer_is_counted_exactly(tiny_llama: Path) -> None:
    import json

    from align.models.loading import load_policy, trainable_parameters
    from align.models.source import source_of

    adapter = AdapterSettings(rank=4)
    shape = Shape.of(json.loads((tiny_llama / "config.json").read_text()))
    assert shape is not None
    model = load_policy(source_of(tiny_llama), adapter=adapter, trainable=True)
    assert shape.adapter_parameters(adapter) == trainable_parameters(model)


def test_an_unknown_shape_has_no_estimate() -> None:
    assert Shape.of({"model_type": "unheard of"}) is None
    assert estimate(settings(), None, 1000, half=False).peak_memory_bytes is None
