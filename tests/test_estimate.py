"""What is counted for a prediction: weights, what autograd keeps of a token, caches, rows; each against the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.estimate.activations import Arithmetic, block_bytes, trunk_bytes
from align.estimate.asking import LIKE_LENGTH, writing_bytes
from align.estimate.logits import BLOCK, LOGITS_AT_ONCE, LOGITS_KEPT_BYTES, Head
from align.estimate.place import LIBRARIES_BYTES, Place
from align.estimate.rows import Rows, counter, rows_like
from align.estimate.shape import Shape
from align.estimate.speed import training_seconds
from align.estimate.training import Learner, training_phases
from align.estimate.weights import frozen_bytes
from align.recipe.settings import AdapterSettings, DpoSettings, EvaluationSettings, KtoLoss, SftSettings

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


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("beyond", [False, True])
def test_the_logits_that_are_counted_are_those_that_autograd_keeps(
    tiny_llama: Path, trains: bool, half: bool, beyond: bool
) -> None:
    """Of a plain head that trains or is frozen, in both arithmetics, at either side of the bound above which they are computed
    again."""
    import torch

    from align.models.head import target_logps
    from align.models.loading import load_policy
    from align.models.source import source_of

    model = load_policy(source_of(tiny_llama), trainable=True)
    matrix = model.get_output_embeddings().weight.requires_grad_(trains)
    most = LOGITS_KEPT_BYTES // ((2 if half else 4) * len(matrix))
    hidden = torch.zeros(most + 1 if beyond else most // 8, matrix.shape[1], requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if len(matrix) in tensor.shape and tensor.shape[0] != len(matrix):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        target_logps(model, hidden, torch.zeros(len(hidden), dtype=torch.long))
    assert sum(kept.values()) == Head(len(matrix), half, trains).kept(len(hidden))
    assert bool(kept) == (trains and not beyond)


def test_logits_that_autograd_turns_into_log_probabilities_are_counted_as_those_that_it_keeps(tiny_llama: Path) -> None:
    """For the gradient of an entropy, and under heads that are more than one matrix."""
    import torch

    from align.models.head import target_logps
    from align.models.loading import load_policy
    from align.models.source import source_of

    model = load_policy(source_of(tiny_llama), trainable=True)
    vocabulary, hidden = len(model.get_output_embeddings().weight), torch.zeros(100, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (100, vocabulary):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        target_logps(model, hidden, torch.zeros(100, dtype=torch.long), entropy=True)
    head = Head(vocabulary, half=False, plain=False)
    assert head.kept(100) <= sum(kept.values()) <= head.kept(100) + head.working(100)


def test_a_chunk_of_logits_is_as_large_as_the_head_makes_it() -> None:
    from align.models import head, plain_head

    assert (LOGITS_AT_ONCE, LOGITS_KEPT_BYTES) == (head.LOGITS_AT_ONCE, head.LOGITS_KEPT_BYTES)
    assert plain_head.BLOCK == BLOCK
    frozen, trained, mixed = Head(1000, False), Head(1000, True, trains=True), Head(1000, True, plain=False)
    assert (frozen.working(100), frozen.working(2**20)) == (4 * 100 * 1000, 4 * LOGITS_AT_ONCE)
    assert trained.working(100) == 4 * 100 * 1000  # in float32, a block at a time
    assert trained.working(2**20) == LOGITS_KEPT_BYTES + 4 * BLOCK
    assert mixed.working(2**20) == 5 * 4 * LOGITS_AT_ONCE


def test_a_head_that_caps_or_scales_its_logits_is_not_plain() -> None:
    plain = {name: Shape.of(LLAMA_8B | change).plain_head for name, change in {  # type: ignore[union-attr]
        "llama": {}, "gemma": {"final_logit_softcapping": 30.0}, "granite": {"logits_scaling": 8.0},
        "cohere": {"logit_scale": 0.0625},
    }.items()}  # fmt: skip
    assert plain == {"llama": True, "gemma": False, "granite": False, "cohere": False}


def test_a_cache_is_as_large_as_the_rows_that_decode_together() -> None:
    from align.rollout import refill

    cache = 10 * 64 * 2 * 2 * 4 * 4  # rows, columns, keys and values, layers, width, bytes
    reading = 10 * 30 * 4 * (3 * 8 + 3 * 16)  # the prompts in the widest layer
    assert writing_bytes(SMALL, 10, 30, 20, half=False) == cache + reading
    assert writing_bytes(SMALL, 10, 30, 20, half=False, mean_prompt=30) == cache + reading
    assert writing_bytes(SMALL, 10, 30, 20, half=False, mean_prompt=15) == cache + reading * 2 / 3
    assert refill.LIKE_LENGTH == LIKE_LENGTH


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


def test_the_micro_batch_that_shares_least_is_the_largest() -> None:
    """Pairs of 60 tokens that compute 40 and of 60 that compute 50: 45 in the mean, 5 more or less."""
    rows = rows_like([pair(20, 10, 10), pair(10, 20, 20)], 50, words, longest=100, cuts=False)
    assert rows is not None
    assert (rows.computed, rows.unevenly) == (pytest.approx(45 / 60), pytest.approx(5))
    assert rows.computed_tokens(240, 1) == pytest.approx(4 * 45)
    assert 4 * 45 < rows.computed_tokens(240, 10) < rows.computed_tokens(240, 1000) < 4 * 55
    assert rows.computed_tokens(60, 1e9) == 60, "no more than all"
    assert rows.halved().computed_tokens(60, 1000) == 60


def test_rows_that_are_too_long_are_left_out_or_cut() -> None:
    turns = [[{"role": "user", "content": "w w"}, {"role": "assistant", "content": "w " * n}] for n in (2, 92)]
    chats = [{"messages": messages} for messages in turns]  # 10 and 100 tokens with the marks of two turns
    dropped, cut = (rows_like(chats, None, words, longest=50, cuts=cuts) for cuts in (False, True))
    assert dropped is not None
    assert cut is not None
    assert (dropped.count, dropped.longest, cut.count, cut.longest) == (1, 10, 2, 50)


@pytest.mark.parametrize("cuts", [False, True])
def test_longer_texts_are_rows_in_the_chunks_that_the_encoder_makes(tiny_tokenizer, cuts: bool) -> None:
    """Whatever happens to rows that are too long. A chunk begins with the last token of the one before."""
    from align.chat.encoder import Encoder
    from align.data.examples import Document

    encoder = Encoder(tiny_tokenizer, max_length=50)
    count = lambda text: len(tiny_tokenizer(text, add_special_tokens=False).input_ids) + 1  # noqa: E731  # BOS and EOS
    texts = ["The heron came to the pier. " * n for n in (1, 5, 20)]
    chunks = [len(row.ids) for text in texts for row in encoder.documents(Document(text))]
    rows = rows_like([{"text": text} for text in texts], 300, count, longest=50, cuts=cuts)
    assert rows is not None
    assert rows.count == 100 * len(chunks) > 900
    assert (rows.mean, rows.longest, rows.computed) == (pytest.approx(sum(chunks) / len(chunks)), 50, 1)


def test_kto_takes_pairs_apart_and_rated_replies_as_they_are() -> None:
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rated = {"prompt": turn("user", "w " * 17), "completion": turn("assistant", "w " * 37), "label": True}
    kto = DpoSettings.model_validate({"kind": "dpo", "data": "x", "loss": {"kind": "kto"}, "batch_tokens": 1024})
    assert isinstance(kto.loss, KtoLoss)
    replies = rows_like([rated], 100, words, longest=100, cuts=False)
    pairs = rows_like([pair(20, 40, 40)], 50, words, longest=100, cuts=False)
    assert replies is not None
    assert pairs is not None
    assert (replies.sides, replies.halved()) == (1, replies)
    assert (pairs.sides, pairs.halved().sides) == (2, 1)
    apart, whole = (
        training_phases(kto, SMALL, rows, EvaluationSettings(), ALONE, half=False)["learning"]
        for rows in (pairs, replies)
    )
    assert apart == pytest.approx(whole, rel=0.001)


def test_the_largest_of_many_steps_is_larger_than_their_mean() -> None:
    rows = Rows(count=1000, mean=100.0, deviation=50.0, longest=400.0)
    assert rows.step_tokens(16, steps=1) == pytest.approx(1600)
    assert 1600 < rows.step_tokens(16, steps=10) < rows.step_tokens(16, steps=1000) < 16 * 400


def test_tokens_are_counted_by_the_models_own_tokenizer(tiny_llama: Path, tiny_tokenizer, tmp_path: Path) -> None:
    text = "The heron came to the pier"
    assert counter(tiny_llama)(text) == len(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    assert counter(tmp_path)(text) == 7  # 26 bytes, four to a token


def test_a_tokenizer_that_cannot_be_read_takes_down_no_prediction(tmp_path: Path) -> None:
    """Whoever loads it says what is wrong."""
    for damaged in ("{", '{"version": "9.0"}', '{"version": "1.0", "model": {"type": "NewPieces"}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        assert counter(tmp_path)("The heron came to the pier") == 7


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_counts_all_tokens(
    tiny_tokenizer, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The heron came to the pier"
    assert counter(tmp_path)(text) == len(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    assert counter(tmp_path)("w") == 1


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
