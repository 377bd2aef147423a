"""What is counted for a prediction: weights, what autograd keeps of a token, caches, rows; each against the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.estimate.activations import Arithmetic, block_bytes, kept_logits, trunk_bytes
from align.estimate.asking import writing_bytes
from align.estimate.place import LIBRARIES_BYTES, Place
from align.estimate.rows import Rows, counter, rows_like
from align.estimate.shape import Shape
from align.estimate.speed import training_seconds
from align.estimate.training import Learner, training_phases
from align.estimate.weights import frozen_bytes
from align.recipe.settings import AdapterSettings, DpoSettings, EvaluationSettings, SftSettings

LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = Shape(
    hidden=8, layers=2, intermediate=16, vocabulary=100, attention=8, key_value=4, tied=True, head=4
)  # fmt: skip
ALONE = Place(gpu=False, has_bfloat16=True, memory_bytes=None)
ROWS = Rows(count=1000, mean=100.0, longest=200.0)


def settings(**changes) -> SftSettings:
    return SftSettings.model_validate({"kind": "sft", "data": "x", "batch_tokens": 1024} | changes)


def memory(**changes) -> float:
    shape = Shape.of(LLAMA_8B)
    assert shape is not None
    return max(training_phases(settings(**changes), shape, ROWS, EvaluationSettings(), ALONE, half=True).values())


def shape_of(folder: Path) -> Shape:
    shape = Shape.of(json.loads((folder / "config.json").read_text()))
    assert shape is not None
    return shape


def test_parameters_are_those_of_the_real_model(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert shape_of(tiny_llama).parameters == AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()


def test_llama_8b_has_its_published_number_of_parameters() -> None:
    shape = Shape.of(LLAMA_8B)
    assert shape is not None
    assert shape.parameters == 8_030_261_248  # the model card's 8.03 billion


def test_each_saving_lowers_the_estimate() -> None:
    adapter = {"kind": "lora", "rank": 16}
    full, lora, qlora = memory(), memory(adapter=adapter), memory(adapter=adapter, quantize="nf4")
    checkpointed = memory(adapter=adapter, quantize="nf4", gradient_checkpointing=True)
    assert full > 120e9 > lora > qlora > checkpointed > LIBRARIES_BYTES


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
def test_the_weights_of_an_adapter_are_counted_exactly(tiny_llama: Path, target: str | list[str]) -> None:
    from align.models.loading import load_policy, trainable_parameters
    from align.models.source import source_of

    adapter = AdapterSettings(rank=4, target=target)
    model = load_policy(source_of(tiny_llama), adapter=adapter, trainable=True)
    assert shape_of(tiny_llama).adapter_parameters(adapter) == trainable_parameters(model)


def test_an_unknown_shape_has_no_estimate() -> None:
    assert Shape.of({"model_type": "unheard of"}) is None


def test_what_a_block_keeps_of_a_token_is_the_sum_written_out() -> None:
    # inputs of two norms, the same divided, their results: 3 x 2 x 8 numbers and two roots; queries, keys, values, result
    # and its copy: 3 x 8 + 2 x 4 numbers and one for each of 2 heads; gate, up, their product and what came of the gate
    assert block_bytes(SMALL, Arithmetic(half=False)) == 4 * (6 * 8 + 2) + 4 * (3 * 8 + 2 * 4 + 2) + 4 * 4 * 16
    # in bfloat16 each of five matrices has a copy of its input, and the norms and the attention stay as they are
    assert block_bytes(SMALL, Arithmetic(half=True)) == (
        4 * (4 * 8 + 2) + 2 * 5 * 8 + 4 * (2 * 8 + 2 * 4 + 2) + 2 * 8 + 2 * 4 * 16
    )


@pytest.mark.parametrize("adapter", [None, AdapterSettings(rank=4)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_counted_is_what_autograd_keeps(
    tiny_llama: Path, adapter: AdapterSettings | None, precision: str
) -> None:
    """Bytes of all distinct tensors that wait for the backward pass, but for weights and their copies in bfloat16. The
    first block above frozen embeddings keeps less than the others, which is not counted: much, of two blocks."""
    import torch

    from align.models.hardware import compute_dtype
    from align.models.loading import load_policy
    from align.models.source import source_of
    from align.models.trunk import hidden_states

    shape, tokens = shape_of(tiny_llama), 200
    model = load_policy(source_of(tiny_llama), adapter=adapter, trainable=True, precision=precision)
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    half = compute_dtype(precision) == torch.bfloat16
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        hidden_states(model, [list(range(3, 103)), list(range(53, 153))])
    waiting = [
        tensor for place, tensor in kept.items() if place not in weights and {tokens, tokens // 2} & {*tensor.shape}
    ]
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in waiting)
    how = Arithmetic(half, adapter.rank if adapter else None)
    assert trunk_bytes(shape, how, tokens, checkpointing=False) == pytest.approx(bytes_kept, rel=0.15)


def test_logits_that_would_take_too_much_are_not_kept() -> None:
    assert kept_logits(SMALL, 1000) == 4 * 1000 * 100
    assert kept_logits(SMALL, 400_000) == 0


def test_a_cache_is_as_large_as_the_rows_that_decode_together() -> None:
    cache = 10 * 64 * 2 * 2 * 4 * 4  # rows, columns, keys and values, layers, width, bytes
    reading = 10 * 30 * 4 * (3 * 8 + 3 * 16)  # the prompts in the widest layer
    assert writing_bytes(SMALL, 10, 30, 20, half=False) == cache + reading


def test_a_quantized_base_is_counted_by_layer() -> None:
    assert frozen_bytes(SMALL, "int8", half=False) == SMALL.block_parameters + 4 * (
        SMALL.parameters - SMALL.block_parameters
    )


# Rows ----------------------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    return len(text.split())


def pair(prompt: int, chosen: int, rejected: int) -> dict:
    turn = lambda role, count: [{"role": role, "content": " ".join(["w"] * (count - 3))}]  # noqa: E731  # 3 for its marks
    return {
        "prompt": turn("user", prompt),
        "chosen": turn("assistant", chosen),
        "rejected": turn("assistant", rejected),
    }


def test_the_prompt_of_a_pair_counts_twice_and_is_computed_once() -> None:
    rows = rows_like([pair(20, 10, 10)], 50, words, longest=100, cuts=False)
    assert rows is not None
    assert (rows.count, rows.mean, rows.prompt) == (50, 60, 20)
    assert rows.computed == pytest.approx(40 / 60)
    assert rows.predicted == pytest.approx(20 / 60)


def test_rows_that_are_too_long_are_left_out_or_cut() -> None:
    texts = [{"text": "w " * 9}, {"text": "w " * 99}]
    dropped, cut = (rows_like(texts, None, words, longest=50, cuts=cuts) for cuts in (False, True))
    assert dropped is not None
    assert cut is not None
    assert (dropped.count, dropped.longest, cut.count, cut.longest) == (1, 10, 2, 50)


def test_the_largest_of_many_steps_is_larger_than_their_mean() -> None:
    rows = Rows(count=1000, mean=100.0, deviation=50.0, longest=400.0)
    assert rows.step_tokens(16, steps=1) == pytest.approx(1600)
    assert 1600 < rows.step_tokens(16, steps=10) < rows.step_tokens(16, steps=1000) < 16 * 400


def test_tokens_are_counted_by_the_models_own_tokenizer(tiny_llama: Path, tiny_tokenizer, tmp_path: Path) -> None:
    text = "The heron came to the pier"
    assert counter(tiny_llama)(text) == len(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    assert counter(tmp_path)(text) == 7  # 26 bytes, four to a token


# Phases --------------------------------------------------------------------------------------------------------------


def test_gradients_are_beside_the_activations_only_where_a_step_has_several_micro_batches() -> None:
    """SMALL has 4 x parameters of gradients; on a GPU nothing is added for an idle heap."""
    gpu = Place(gpu=True, has_bfloat16=True, memory_bytes=None)
    one = Learner(settings(batch_size=2, batch_tokens=200, max_steps=1), SMALL, gpu, half=False)
    two = Learner(settings(batch_size=4, batch_tokens=200, max_steps=1), SMALL, gpu, half=False)
    rows = Rows(count=100, mean=100.0, longest=100.0)
    assert two.learning(rows) - one.learning(rows) == 4 * SMALL.parameters


def test_fsdp_divides_weights_and_optimiser_state_and_ddp_does_not() -> None:
    shape = Shape.of(LLAMA_8B)
    assert shape is not None

    def learning(strategy: str) -> float:
        place = Place(True, True, None, processes=8, strategy=strategy)  # type: ignore[arg-type]
        return training_phases(settings(), shape, ROWS, EvaluationSettings(), place, half=True)["learning"]

    assert learning("ddp") >= 16 * shape.parameters > 3 * learning("fsdp")


def test_a_shared_prompt_takes_its_time_once() -> None:
    chosen = DpoSettings.model_validate({"kind": "dpo", "data": "x"})
    apart = Rows(count=100, mean=60.0, computed=1.0)
    shared = Rows(count=100, mean=60.0, computed=40 / 60)
    assert training_seconds(chosen, SMALL, shared) == pytest.approx(training_seconds(chosen, SMALL, apart) * 2 / 3)
