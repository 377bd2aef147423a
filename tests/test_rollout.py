"""Our decode loop says what transformers' says, whatever shares the batch, and leaves the model as it was."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from align.errors import AlignError
from align.rollout import generation as rollout
from align.rollout.generation import Sampling, generate
from align.rollout.left_padded import left_padded
from align.rollout.sampling import choose, uniforms

STOP = 2
TEXTS = ["The heron", "Who has the key? The master", "a", "Once upon a time there was a small boat that"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2", "gemma2"])
def loaded(request):
    """A tiny model of each family (sharpened, so that no two tokens tie), and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_llama"))
    if request.param in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"tiny_{request.param}"))
    else:
        torch.manual_seed(0)
        config, kind = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM)}[
            request.param
        ]
        model = kind(
            config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                intermediate_size=64, vocab_size=len(tokenizer), max_position_embeddings=256, sliding_window=8,
                pad_token_id=0, bos_token_id=1, eos_token_id=STOP,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval(), tokenizer


@pytest.fixture
def gpt2(tiny_gpt2):
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2), AutoTokenizer.from_pretrained(tiny_gpt2)


def encoded(tokenizer, texts=TEXTS):
    return [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


def by_transformers(model, prompt, **options):
    config = GenerationConfig(max_new_tokens=20, eos_token_id=STOP, pad_token_id=0, **options)
    return model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()


def scored(model, prompt, reply, temperature=1.0):
    """Log-probabilities of the reply's tokens from one plain forward pass without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(reply)), reply].tolist()


def test_greedy_equals_transformers_token_for_token(loaded):
    model, tokenizer = loaded
    prompts = encoded(tokenizer)
    replies = generate(model, tokenizer, prompts, Sampling(max_new_tokens=20), stop_ids=[STOP])
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.ids == by_transformers(model, prompt, do_sample=False)


def test_beams_equal_transformers_token_for_token(loaded):
    model, tokenizer = loaded
    prompts = encoded(tokenizer)
    replies = generate(model, tokenizer, prompts, Sampling(max_new_tokens=20, beams=3), stop_ids=[STOP])
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.ids == by_transformers(model, prompt, do_sample=False, num_beams=3)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_equal_a_plain_forward_pass(loaded, temperature):
    model, tokenizer = loaded
    prompts = encoded(tokenizer)
    sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=5)
    for prompt, reply in zip(prompts, generate(model, tokenizer, prompts, sampling, stop_ids=[STOP]), strict=True):
        assert reply.logps == pytest.approx(scored(model, prompt, reply.ids, temperature or 1.0), abs=1e-4)


def test_a_state_space_model_goes_on_from_its_state(gpt2):
    """It has a cache of another name, and no mask over columns that its state has taken in."""
    _, tokenizer = gpt2
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    prompts = encoded(tokenizer)
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    for prompt, reply in zip(prompts, generate(model, tokenizer, prompts, sampling, stop_ids=[STOP]), strict=True):
        assert reply.logps == pytest.approx(scored(model, prompt, reply.ids), abs=1e-4)


def test_a_row_gets_the_same_answer_whatever_shares_its_batch(gpt2, monkeypatch):
    model, tokenizer = gpt2
    prompts = encoded(tokenizer) * 3
    sampling = Sampling(max_new_tokens=16, temperature=0.9, top_k=50, top_p=0.95, seed=11)
    together = generate(model, tokenizer, prompts, sampling, stop_ids=[STOP])
    monkeypatch.setattr(rollout, "TOKENS_AT_ONCE", 40)
    apart = generate(model, tokenizer, prompts, sampling, stop_ids=[STOP])
    assert [reply.ids for reply in together] == [reply.ids for reply in apart]
    assert together[0].ids != together[4].ids, "equal prompts in other rows draw other numbers"
    other = generate(model, tokenizer, prompts, Sampling(max_new_tokens=16, temperature=0.9, seed=12), stop_ids=[STOP])
    assert [reply.ids for reply in other] != [reply.ids for reply in apart]


def test_finished_rows_leave_the_batch_and_the_others_go_on(loaded):
    model, tokenizer = loaded
    prompts, stops = encoded(tokenizer) * 2, set(range(100, 130))
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: sizes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    replies = generate(model, tokenizer, prompts, Sampling(30, temperature=1.0, seed=1), stop_ids=sorted(stops))
    hook.remove()
    steps = [rows for rows, columns in sizes if columns == 1]
    assert steps == sorted(steps, reverse=True)
    assert sum(steps) == sum(len(reply.ids) for reply in replies) - len(prompts), "no step computes a finished row"
    assert len({len(reply.ids) for reply in replies}) > 3
    for reply in replies:
        assert reply.finished == (reply.ids[-1] in stops)
        assert not stops & set(reply.ids[:-1])


def test_the_stop_token_is_kept_in_ids_and_left_out_of_the_text(gpt2):
    model, tokenizer = gpt2
    prompt = encoded(tokenizer)[:1]
    plain = generate(model, tokenizer, prompt, Sampling(6), stop_ids=[])[0]
    assert not plain.finished
    assert len(plain.ids) == 6
    place = plain.ids.index(plain.ids[3])
    stopped = generate(model, tokenizer, prompt, Sampling(6), stop_ids=[plain.ids[3]])[0]
    assert stopped.finished
    assert stopped.ids == plain.ids[: place + 1]
    assert stopped.text == tokenizer.decode(plain.ids[:place])


def test_a_stop_string_ends_the_reply_and_its_text(gpt2):
    model, tokenizer = gpt2
    prompts = encoded(tokenizer)
    plain = generate(model, tokenizer, prompts, Sampling(12, temperature=1.0), stop_ids=[])
    stop = plain[1].text[3:5]
    stopped = generate(model, tokenizer, prompts, Sampling(12, temperature=1.0, stop=(stop,)), stop_ids=[])
    assert stopped[1].finished
    assert stopped[1].text == plain[1].text[: plain[1].text.index(stop)]
    assert stopped[1].ids == plain[1].ids[: len(stopped[1].ids)]
    assert len(stopped[1].ids) < 12
    for before, after in zip(plain, stopped, strict=True):
        assert stop not in after.text
        assert before.text.startswith(after.text)


def test_mode_and_gradients_are_as_before_even_after_an_error(gpt2):
    model, tokenizer = gpt2
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    prompts = encoded(tokenizer)
    first = generate(model, tokenizer, prompts, Sampling(8), stop_ids=[STOP])
    assert first == generate(model, tokenizer, prompts, Sampling(8), stop_ids=[STOP]), "dropout is off"
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, prompts, Sampling(8), stop_ids=[STOP], on_token=lambda *_: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_prompts_without_room_are_refused_and_replies_end_with_the_context(gpt2):
    model, tokenizer = gpt2
    with pytest.raises(AlignError, match=r"prompt 2 has 256 tokens.*context of 256"):
        generate(model, tokenizer, [[1], [5] * 256], Sampling(4), stop_ids=[STOP])
    with pytest.raises(AlignError, match="prompt 1 is empty"):
        generate(model, tokenizer, [[]], Sampling(4), stop_ids=[STOP])
    long, short = generate(model, tokenizer, [[5] * 250, [5] * 9], Sampling(40), stop_ids=[])
    assert (len(long.ids), len(short.ids)) == (6, 40)
    beams = generate(model, tokenizer, [[5] * 250, [5] * 9], Sampling(40, beams=2), stop_ids=[])
    assert [len(reply.ids) for reply in beams] == [6, 40]


def test_no_prompts_give_no_replies(gpt2):
    assert generate(*gpt2, [], Sampling(), stop_ids=[STOP]) == []


def test_an_adapter_decodes_and_a_models_own_penalties_do_not_reach_beams(gpt2):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = gpt2
    prompts = encoded(tokenizer)
    greedy, beams = Sampling(10), Sampling(10, beams=2)
    want = [generate(model, tokenizer, prompts, s, stop_ids=[STOP]) for s in (greedy, beams)]
    model.generation_config.repetition_penalty = 5.0
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"]))
    got = [generate(adapted, tokenizer, prompts, s, stop_ids=[STOP]) for s in (greedy, beams)]
    assert [[reply.ids for reply in replies] for replies in got] == [[reply.ids for reply in r] for r in want]
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0"),
        ({"top_k": 5}, "no effect at temperature 0"),
        ({"beams": 2, "temperature": 1.0}, "exclude each other"),
        ({"stop": ("",)}, "stop string is empty"),
    ],
)
def test_settings_that_cannot_act_are_refused(settings, message):
    with pytest.raises(AlignError, match=message):
        Sampling(**settings)


def test_left_padding_counts_positions_from_the_first_real_token():
    ids, mask, positions = left_padded([[7, 8, 9], [4]], torch.device("cpu"))
    assert ids.tolist() == [[7, 8, 9], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_sampled_tokens_have_the_frequencies_of_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    drawn = uniforms(0, [0], 20_000)[0]
    tokens, logps = choose(logits, drawn, temperature=1.5)
    want = (logits[0] / 1.5).softmax(-1)
    assert (tokens.bincount(minlength=4) / 20_000 - want).abs().max() < 0.01
    assert torch.allclose(logps, want.log()[tokens], atol=1e-5)


def test_top_k_and_top_p_keep_the_likeliest_tokens_only():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(4000, 4)
    drawn = uniforms(1, [0], 4000)[0]
    assert set(choose(logits, drawn, temperature=1.0, top_k=2)[0].tolist()) == {1, 3}
    assert set(choose(logits, drawn, temperature=1.0, top_p=0.74)[0].tolist()) == {1, 3}
    assert set(choose(logits, drawn, temperature=1.0, top_p=0.76)[0].tolist()) == {1, 2, 3}
    assert set(choose(logits, drawn, temperature=1.0, top_p=0.01)[0].tolist()) == {1}


def test_the_ends_of_the_uniform_interval_never_draw_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, 4)
    tokens, _ = choose(logits, torch.tensor([2.0**-24, 1 - 2.0**-24]), temperature=1.0)
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
def test_draws_agree_with_torch_multinomial_by_chi_square(vocabulary):
    torch.manual_seed(vocabulary)
    logits = torch.randn(1, vocabulary) * 2
    logits[0, 3] = -torch.inf
    drawn = uniforms(4, [0], 40_000)[0]
    tokens = torch.cat([choose(logits.expand(len(part), -1), part, temperature=1.0)[0] for part in drawn.split(4000)])
    want = logits[0].double().softmax(-1) * len(tokens)
    counts, oracle = (
        ids.bincount(minlength=vocabulary).double()
        for ids in (tokens, torch.multinomial(logits[0].softmax(-1), len(tokens), replacement=True))
    )
    often = want >= 5
    freedom = int(often.sum())
    for found in (counts, oracle):
        chi_square = ((found - want)[often] ** 2 / want[often]).sum()
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    assert counts[3] == 0


def test_a_large_vocabulary_keeps_its_accuracy():
    """150,000 near-equal tokens: a running sum in float32 must not swallow the late ones."""
    torch.manual_seed(0)
    logits = torch.randn(1, 150_001) * 0.1
    drawn = torch.linspace(0.001, 0.999, 200)
    tokens, logps = choose(logits.expand(200, -1), drawn, temperature=1.0)
    exact = logits[0].double().softmax(-1).cumsum(0)
    assert (exact[tokens] - drawn.double()).abs().max() < 2e-5, "within the width of a token or two"
    assert torch.allclose(logps.double(), logits[0].double().log_softmax(-1)[tokens], atol=1e-5)


def test_a_token_of_no_probability_is_never_drawn_whatever_the_block():
    logits = torch.full((4096, 700), -torch.inf)
    logits[:, [5, 255, 256, 600]] = torch.tensor([0.0, -3.0, 2.0, -20.0])
    tokens, logps = choose(logits, uniforms(0, [0], 4096)[0], temperature=0.5)
    assert set(tokens.tolist()) <= {5, 255, 256, 600}
    assert logps.isfinite().all()
    ends = choose(logits[:2], torch.tensor([2.0**-24, 1 - 2.0**-24]), temperature=1.0)[0]
    assert ends.tolist() == [5, 256], "600 has a share of 2e-10, beyond the last uniform number"


def test_a_running_sum_that_falls_by_rounding_leads_to_no_token_of_no_probability(monkeypatch):
    """As on a GPU, which adds in an order of its own."""
    plain = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor,
        "cumsum",
        lambda values, dim: plain(values, dim) + 1e-3 * torch.arange(values.shape[1]).remainder(2),
    )
    logits = torch.full((1, 8), -torch.inf)
    logits[0, ::2] = 0.0
    tokens, _ = choose(logits.expand(2001, -1), torch.linspace(2.0**-24, 1 - 2.0**-24, 2001), temperature=1.0)
    assert set(tokens.tolist()) == {0, 2, 4, 6}


@pytest.mark.slow
def test_faster_than_transformers_with_replies_of_many_lengths(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K").eval()
    prompts = [tokenizer("Once upon a time there was a " + word)["input_ids"] for word in ["dog", "big cat"] * 32]
    stops = tokenizer("the and", add_special_tokens=False)["input_ids"]
    sampling = Sampling(max_new_tokens=96, temperature=1.0, seed=0)
    generate(model, tokenizer, prompts, sampling, stop_ids=stops)
    start = time.perf_counter()
    generate(model, tokenizer, prompts, sampling, stop_ids=stops)
    ours = time.perf_counter() - start
    ids, mask, _ = left_padded(prompts, torch.device("cpu"))
    config = GenerationConfig(max_new_tokens=96, do_sample=True, top_k=0, eos_token_id=stops, pad_token_id=0)
    start = time.perf_counter()
    model.generate(ids, attention_mask=mask, generation_config=config)
    assert ours < time.perf_counter() - start
