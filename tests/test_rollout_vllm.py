"""vLLM as the generator, held against a stand-in with its interface: weights, log-probabilities, refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import AlignError
from align.models.adapters import AdapterRecord, add_adapter
from align.recipe.settings import AdapterSettings
from align.rollout.engine import Engine
from align.rollout.generation import Sampling, generate
from align.rollout.scoring import answer_logps, reply_row
from align.rollout.vllm import VllmEngine
from tests import vllm_stand_in

PROMPTS = [[1, 50, 60, 70], [1, 9], [1, 200, 201, 5, 6, 7, 8]]
STOPS = [2, 40, 41]


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in where vllm would be."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm_stand_in.LLM.made.clear()
    return vllm_stand_in.LLM


@pytest.fixture
def policy(tiny_llama):
    """A full model, sharpened so that weights matter, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model, AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def adapted(tiny_llama):
    """An adapter of ours on the tiny model, already away from its start."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    record = AdapterRecord(str(tiny_llama), None, "0" * 64, None, "float32")
    adapter = add_adapter(model, AdapterSettings(rank=4), record, added=[], seed=0)
    disturb(adapter)
    return adapter, AutoTokenizer.from_pretrained(tiny_llama)


def disturb(model, seed=1):
    """One step of training, as it were."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def made(tokenizer, folder, temperature=1.0) -> Engine:
    return VllmEngine(tokenizer, STOPS, folder, temperature=temperature, max_tokens=64, dtype="float32")


def mismatch(model, replies):
    """Mean |difference| per token between the engine's log-probabilities and a scoring pass at temperature 1."""
    rows = [reply_row(prompt, reply.ids) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    scored = answer_logps(model, rows)
    ours = torch.tensor([sum(reply.logps) for reply in replies], dtype=torch.float64)
    return float(((ours - scored.sums).abs() / scored.tokens).mean())


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_the_weights_of_each_round_reach_the_generator(request, kind, vllm, tmp_path):
    model, tokenizer = request.getfixturevalue(kind)
    engine = made(tokenizer, tmp_path)
    for round_number in range(3):
        engine.sync(model)
        replies = engine.generate(model, PROMPTS, Sampling(8))
        local = generate(model, tokenizer, PROMPTS, Sampling(8), stop_ids=STOPS)
        assert [(reply.ids, reply.text, reply.finished) for reply in replies] == [
            (reply.ids, reply.text, reply.finished) for reply in local
        ]
        assert mismatch(model, replies) < 1e-4
        disturb(model, seed=round_number)
        assert mismatch(model, replies) > 1e-2, "without a sync the generator is a round behind"
    assert len(vllm.made) == 1, "the engine starts once"
    assert [path.name for path in tmp_path.iterdir()] == ["weights-3"], "weights of past rounds are removed"


def test_an_adapter_is_served_on_the_base_of_its_record(adapted, vllm, tmp_path, tiny_llama):
    model, tokenizer = adapted
    made(tokenizer, tmp_path).sync(model)
    (llm,) = vllm.made
    assert (llm.model, llm.enable_lora, llm.max_lora_rank, llm.quantization) == (str(tiny_llama), True, 8, None)
    assert (llm.dtype, llm.max_model_len) == ("float32", 64)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("temperature", "cuts"), [(1.0, {}), (1.0, {"top_k": 20, "top_p": 0.9}), (0.7, {}), (0.7, None)]
)
def test_log_probabilities_are_those_of_the_sampling_temperature_before_any_cut(policy, tmp_path, temperature, cuts):
    model, tokenizer = policy
    engine = made(tokenizer, tmp_path, temperature)
    sampling = Sampling(10, seed=3) if cuts is None else Sampling(10, temperature=temperature, seed=3, **cuts)
    for prompt, reply in zip(PROMPTS, engine.generate(model, PROMPTS, sampling), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply.ids])).logits[0, len(prompt) - 1 : -1]
        want = (logits / (sampling.temperature or 1)).log_softmax(-1)[range(len(reply.ids)), reply.ids]
        assert reply.logps == pytest.approx(want.tolist(), abs=1e-4)


@pytest.mark.usefixtures("vllm")
def test_rows_and_seeds_draw_apart_and_the_same_seed_draws_the_same(policy, tmp_path):
    model, tokenizer = policy
    engine = made(tokenizer, tmp_path)
    same = [PROMPTS[0]] * 4
    first, again, other = (
        [reply.ids for reply in engine.generate(model, same, Sampling(12, temperature=1.0, seed=seed))]
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert len({tuple(ids) for ids in first}) == 4


def test_a_distorted_generator_shows_as_a_mismatch(policy, vllm, tmp_path):
    model, tokenizer = policy
    engine = made(tokenizer, tmp_path)
    sampling = Sampling(16, temperature=1.0, seed=1)
    exact = mismatch(model, engine.generate(model, PROMPTS, sampling))
    vllm.made[0].noise = 0.3
    distorted = mismatch(model, engine.generate(model, PROMPTS, sampling))
    assert exact < 1e-4
    assert distorted > 0.02


@pytest.mark.usefixtures("vllm")
def test_replies_end_at_the_stop_ids_alone_and_with_the_context(policy, tmp_path):
    model, tokenizer = policy
    engine = VllmEngine(tokenizer, [], tmp_path, temperature=1.0, max_tokens=256, dtype="float32")
    replies = engine.generate(model, [[1, 5], [7] * 250], Sampling(30, temperature=1.0))
    assert [(len(reply.ids), reply.finished) for reply in replies] == [(30, False), (6, False)]


def test_without_vllm_the_error_says_what_to_install(policy, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(AlignError, match=r"needs the package vllm.*\n.*pip install 'vllm"):
        made(policy[1], tmp_path)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(4, beams=2), "neither beams nor stop strings"),
        (Sampling(4, temperature=0.7, stop=("x",)), "neither beams nor stop strings"),
        (Sampling(4, temperature=1.0), "made for temperature 0.7, not 1.0"),
        (Sampling(4, temperature=0.7, top_k=5), "before top_k and top_p at temperature 0.7"),
    ],
)
def test_what_vllm_cannot_do_exactly_is_refused(policy, tmp_path, sampling, message):
    with pytest.raises(AlignError, match=message):
        made(policy[1], tmp_path, temperature=0.7).generate(policy[0], PROMPTS, sampling)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("settings", "added", "message"), [({"dora": True}, [], "has use_dora"), ({}, [3], "has trainable_token_indices")]
)
def test_an_adapter_that_vllm_would_apply_in_part_is_refused(tmp_path, tiny_llama, settings, added, message):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    record = AdapterRecord(str(tiny_llama), None, "0" * 64, None, "float32")
    adapter = add_adapter(model, AdapterSettings(rank=4, **settings), record, added=added, seed=0)
    with pytest.raises(AlignError, match=message):
        made(AutoTokenizer.from_pretrained(tiny_llama), tmp_path).sync(adapter)
