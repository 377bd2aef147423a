"""Rows that share a ragged batch get what each would get alone, and the batch is kept full."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from align.models.loading import load_policy
from align.models.source import source_of
from align.recipe.settings import AdapterSettings
from align.rollout import cache, generation, refill
from align.rollout.cache import is_plain
from align.rollout.engine import Engine, LocalEngine
from align.rollout.generation import Sampling, generate
from align.rollout.sampling import choose, uniforms
from align.rollout.scoring import answer_logps, reply_row

STOPS = [2, 40, 41, 42, 43, 44, 45]
SAMPLINGS = {
    "greedy": Sampling(14),
    "sampled": Sampling(14, temperature=1.0, seed=3),
    "cut": Sampling(14, temperature=0.8, top_k=40, top_p=0.9, seed=4),
    "one": Sampling(1, temperature=1.0, seed=5),
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request):
    """A tiny model (sharpened, so that no two tokens tie) and its tokenizer; Llama shares keys among query heads."""
    folder = request.getfixturevalue(f"tiny_{request.param}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts():
    """Twelve prompts of 1 to 40 tokens, in no order of length."""
    draw = random.Random(0)
    return [[draw.randrange(3, 290) for _ in range(n)] for n in (5, 40, 1, 9, 9, 23, 2, 17, 31, 5, 12, 3)]


class Passes:
    """Shapes (rows, columns) of the forward passes of a model while it is watched."""

    def __init__(self, model):
        self.prefills, self.steps = [], []
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, __, options):
        kind = self.prefills if options["attention_mask"] is None else self.steps
        kind.append(tuple(options["input_ids"].shape))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def with_slots(monkeypatch, prompts, sampling, slots):
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    monkeypatch.setattr(generation, "TOKENS_AT_ONCE", slots * longest)


def alone(model, prompt, row, sampling, stops):
    """One row decoded without a cache, by the plain equations: the oracle."""
    ids, logps = [], []
    drawn = uniforms(sampling.seed, [row], sampling.max_new_tokens)[0]
    while len(ids) < sampling.max_new_tokens and not set(ids) & set(stops):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[:, -1]
        number = drawn[len(ids)][None] if sampling.temperature else None
        token, logp = choose(
            logits, number, temperature=sampling.temperature or 1.0, top_k=sampling.top_k, top_p=sampling.top_p
        )
        ids.append(int(token))
        logps.append(float(logp))
    return ids, logps


@pytest.mark.parametrize("slots", [1, 3, 12])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_and_log_probabilities_are_those_of_each_row_alone(loaded, prompts, monkeypatch, name, slots):
    model, tokenizer = loaded
    sampling = SAMPLINGS[name]
    with_slots(monkeypatch, prompts, sampling, slots)
    monkeypatch.setattr(cache, "COLUMN_STEP", 1)  # no room to spare, so that every growth is seen
    assert refill.suits(model)
    replies = generate(model, tokenizer, prompts, sampling, stop_ids=STOPS)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids, logps = alone(model, prompt, row, sampling, STOPS)
        assert reply.ids == ids
        assert reply.logps == pytest.approx(logps, abs=1e-5)
        assert reply.finished == (ids[-1] in STOPS)


def test_the_left_padded_loop_says_the_same(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    sampling = SAMPLINGS["sampled"]
    ragged = generate(model, tokenizer, prompts, sampling, stop_ids=STOPS)
    monkeypatch.setattr(refill, "suits", lambda _: False)
    monkeypatch.setattr(refill, "decode", None)
    padded = generate(model, tokenizer, prompts, sampling, stop_ids=STOPS)
    assert [reply.ids for reply in padded] == [reply.ids for reply in ragged]
    for one, other in zip(padded, ragged, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_log_probabilities_equal_a_scoring_pass(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    with_slots(monkeypatch, prompts, SAMPLINGS["sampled"], 4)
    replies = generate(model, tokenizer, prompts, SAMPLINGS["sampled"], stop_ids=STOPS)
    scored = answer_logps(model, [reply_row(p, r.ids) for p, r in zip(prompts, replies, strict=True)])
    assert [sum(reply.logps) for reply in replies] == pytest.approx(scored.sums.tolist(), abs=1e-4)


def test_bfloat16_autocast_gives_the_log_probabilities_of_a_scoring_pass(loaded, prompts):
    model, tokenizer = loaded
    with torch.autocast("cpu", torch.bfloat16):
        replies = generate(model, tokenizer, prompts, SAMPLINGS["sampled"], stop_ids=STOPS)
        scored = answer_logps(model, [reply_row(p, r.ids) for p, r in zip(prompts, replies, strict=True)])
    for reply, total in zip(replies, scored.sums.tolist(), strict=True):
        assert sum(reply.logps) == pytest.approx(total, abs=0.05 * len(reply.ids))


def test_free_places_are_refilled_and_no_step_computes_a_finished_row(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    queue, sampling = prompts * 4, Sampling(40, temperature=1.0, seed=1)
    monkeypatch.setattr(refill, "shared_prefixes", lambda _: {})
    with_slots(monkeypatch, queue, sampling, 8)
    with Passes(model) as passes:
        replies = generate(model, tokenizer, queue, sampling, stop_ids=STOPS)
    lengths = [len(reply.ids) for reply in replies]
    assert sum(rows for rows, _ in passes.steps) == sum(lengths) - len(queue), "a step for each token after the first"
    assert sum(rows for rows, _ in passes.prefills) == len(queue)
    in_groups = sum(max(lengths[start : start + 8]) for start in range(0, len(queue), 8))
    assert len(passes.steps) < 0.75 * in_groups
    assert max(rows for rows, _ in passes.steps) >= 8
    assert len(passes.prefills) < len(queue) / 1.5, "prompts of like length are prefilled together"


def test_shorter_rows_share_a_batch_in_greater_number(loaded, monkeypatch):
    model, tokenizer = loaded
    queue = [[7] * 90, *[[9, index + 10] for index in range(30)]]
    monkeypatch.setattr(generation, "TOKENS_AT_ONCE", 200)
    with Passes(model) as passes:
        generate(model, tokenizer, queue, Sampling(10), stop_ids=[])
    assert passes.steps[0][0] == 2, "200 tokens of cache hold two rows as long as the first"
    assert max(rows for rows, _ in passes.steps) == 200 // 12


def test_the_head_reads_one_place_of_each_prompt(loaded, prompts):
    model, tokenizer = loaded
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    generate(model, tokenizer, prompts, Sampling(3), stop_ids=[])
    hook.remove()
    assert {shape[1] for shape in seen} == {1}
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_an_end_at_the_first_token_leaves_the_others_in_place(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    plain = generate(model, tokenizer, prompts, Sampling(8), stop_ids=[])
    stops = sorted({reply.ids[0] for reply in plain[::3]})
    for slots in (2, 12):
        with_slots(monkeypatch, prompts, Sampling(8), slots)
        for row, reply in enumerate(generate(model, tokenizer, prompts, Sampling(8), stop_ids=stops)):
            ids = plain[row].ids
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids) - 1)
            assert reply.ids == ids[: end + 1]


def test_pad_equal_to_the_stop_token_changes_nothing(loaded, prompts):
    model, tokenizer = loaded
    usual = generate(model, tokenizer, [[2, *prompt, 2] for prompt in prompts], Sampling(9), stop_ids=STOPS)
    model.config.pad_token_id, before = 2, model.config.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token
    same = generate(model, tokenizer, [[2, *prompt, 2] for prompt in prompts], Sampling(9), stop_ids=STOPS)
    model.config.pad_token_id, tokenizer.pad_token = before, "<pad>"
    assert same == usual


def test_rows_that_end_with_the_context_share_a_batch_with_others(loaded, monkeypatch):
    model, tokenizer = loaded
    queue = [[5] * 250, [6] * 9, [7] * 255, [8] * 30]
    for budget in (256, 2000):
        monkeypatch.setattr(generation, "TOKENS_AT_ONCE", budget)
        replies = generate(model, tokenizer, queue, Sampling(20), stop_ids=[])
        assert [len(reply.ids) for reply in replies] == [6, 20, 1, 20]
        for row, (prompt, reply) in enumerate(zip(queue, replies, strict=True)):
            sampling = Sampling(len(reply.ids))
            assert reply.ids == alone(model, prompt, row, sampling, [])[0]


def test_stop_strings_end_rows_one_by_one(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    sampling = Sampling(12, temperature=1.0, seed=8)
    plain = generate(model, tokenizer, prompts, sampling, stop_ids=[])
    stop = plain[1].text[3:5]
    with_slots(monkeypatch, prompts, sampling, 3)
    stopping = Sampling(12, temperature=1.0, seed=8, stop=(stop,))
    stopped = generate(model, tokenizer, prompts, stopping, stop_ids=[])
    assert stopped[1].finished
    for before, after in zip(plain, stopped, strict=True):
        assert stop not in after.text
        assert before.ids[: len(after.ids)] == after.ids
        assert (len(after.ids) < 12) <= after.finished


def test_every_token_is_told_as_it_is_chosen(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    with_slots(monkeypatch, prompts, Sampling(6), 3)
    told = {row: [] for row in range(len(prompts))}
    replies = generate(
        model, tokenizer, prompts, Sampling(6), stop_ids=STOPS, on_token=lambda row, token: told[row].append(token)
    )
    assert list(told.values()) == [reply.ids for reply in replies]


def test_an_adapter_decodes_as_its_merged_model(loaded, prompts):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ragged = generate(adapted, tokenizer, prompts, Sampling(8), stop_ids=STOPS)
    for row, (prompt, reply) in enumerate(zip(prompts, ragged, strict=True)):
        assert reply.ids == alone(adapted, prompt, row, Sampling(8), STOPS)[0]
    adapted.unload()


def test_an_adapter_on_a_4_bit_base_decodes_in_ragged_batches(tiny_llama, prompts, monkeypatch):
    settings = AdapterSettings(rank=4)
    model = load_policy(source_of(tiny_llama), quantize="nf4", adapter=settings, trainable=True, precision="float32")
    assert refill.suits(model)
    with_slots(monkeypatch, prompts, SAMPLINGS["sampled"], 4)
    replies = generate(model, AutoTokenizer.from_pretrained(tiny_llama), prompts, SAMPLINGS["sampled"], stop_ids=STOPS)
    scored = answer_logps(model, [reply_row(p, r.ids) for p, r in zip(prompts, replies, strict=True)])
    assert [sum(reply.logps) for reply in replies] == pytest.approx(scored.sums.tolist(), abs=1e-3)


def test_models_that_a_mask_of_ours_cannot_steer_take_the_left_padded_loop(loaded, monkeypatch):
    model, _ = loaded
    assert refill.suits(model)
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    assert not refill.suits(model), "eager attention adds its mask, and ours is of true and false"
    assert not is_plain(Gemma2Config(num_hidden_layers=2, sliding_window=8)), "a window forgets"


def test_the_local_engine_generates_with_the_model_that_it_is_given(loaded, prompts):
    model, tokenizer = loaded
    engine: Engine = LocalEngine(tokenizer, STOPS)
    engine.sync(model)
    assert engine.generate(model, prompts, Sampling(5)) == generate(
        model, tokenizer, prompts, Sampling(5), stop_ids=STOPS
    )
