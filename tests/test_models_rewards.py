"""One text, one reward: whatever stands beside it in the batch, wherever the padding is, before saving and after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from align.batches import Batch
from align.errors import AlignError
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.rewards import require_reward, reward_scores
from align.models.source import source_of
from tests.test_models_training import WAYS, save, snapshot

EOS, PAD = 2, 0
TEXTS = [[1, 9, 8, 7, EOS], [1, 30, EOS], [1, *range(40, 100), EOS], [1, 12, EOS, 13, EOS], [1, 5, 6, 7, 8, 9, 10]]


def batch(rows: list[list[int]], pad_id: int = PAD, side: str = "right") -> Batch:
    longest = max(map(len, rows))
    fill = [[pad_id] * (longest - len(row)) for row in rows]
    marks = [[1] * len(row) for row in rows]
    if side == "right":
        ids, mask = ([r + f for r, f in zip(rows, fill)], [m + [0] * len(f) for m, f in zip(marks, fill)])
    else:
        ids, mask = ([f + r for r, f in zip(rows, fill)], [[0] * len(f) + m for m, f in zip(marks, fill)])
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(mask).bool())


def scores(model: Any, rows: list[list[int]], **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return reward_scores(model, batch(rows, **how))


def train_reward(model: Any, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        values = reward_scores(model, batch(TEXTS))
        (-torch.nn.functional.logsigmoid(values[0] - values[1:])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    config = Qwen2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=len(tiny_tokenizer), pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return made(Qwen2ForCausalLM(config), tiny_tokenizer, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    config = Gemma2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        head_dim=16, vocab_size=len(tiny_tokenizer), pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return made(Gemma2ForCausalLM(config), tiny_tokenizer, tmp_path_factory.mktemp("gemma2"))


def made(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tiny_qwen2", "tiny_gemma2"])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_reward_depends_on_its_text_alone(base: Path) -> None:
    model = load_reward(source_of(base), trainable=True).eval()
    alone = torch.cat([scores(model, [text]) for text in TEXTS])
    assert alone.std() > 0.01
    for side in ("right", "left"):
        for pad_id in (PAD, EOS, 77):
            together = scores(model, TEXTS, side=side, pad_id=pad_id)
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    order = [3, 0, 4, 2, 1]
    shuffled = scores(model, [TEXTS[i] for i in order] * 4)
    torch.testing.assert_close(shuffled, alone[order].repeat(4), atol=1e-5, rtol=1e-4)


def test_the_stop_token_counts_even_where_it_is_the_pad_token_too(tiny_llama: Path) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True).eval()
    with_stop, without = scores(model, [[1, 9, 8, EOS], [1, 9, 8]], pad_id=EOS)
    assert (with_stop - without).abs() > 1e-3


def test_transformers_own_forward_gives_the_same_rewards(base: Path, tmp_path: Path) -> None:
    model = load_reward(source_of(base), trainable=True, tokenizer=load_tokenizer(source_of(base)))
    train_reward(model)
    plain = AutoModelForSequenceClassification.from_pretrained(save(model, tmp_path / "saved", base)).eval()
    assert plain.config.pad_token_id == PAD
    assert plain.config.num_labels == 1
    padded = batch(TEXTS)
    with torch.no_grad():
        together = plain(padded.input_ids, attention_mask=padded.attention_mask).logits[:, 0]
        alone = torch.cat([plain(torch.tensor([text])).logits[:, 0] for text in TEXTS])
    torch.testing.assert_close(together, scores(model, TEXTS), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone, scores(model, TEXTS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["full", "lora", "dora", "pissa", "nf4", "int8"])
def test_a_reward_model_is_read_back_as_it_was_trained(tiny_llama: Path, tmp_path: Path, way: str) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True, **WAYS[way])
    before = snapshot(model)
    train_reward(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in moved)
    source = source_of(save(model, tmp_path / "saved", tiny_llama))
    assert source.kind == ("reward" if way == "full" else "adapter-reward")
    require_reward(source)
    torch.testing.assert_close(scores(load_reward(source), TEXTS), scores(model, TEXTS), atol=1e-5, rtol=1e-5)


def test_plain_peft_opens_a_reward_adapter_with_its_head(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True, **WAYS["lora"])
    train_reward(model)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        save(model, tmp_path / "saved", tiny_llama), num_labels=1
    ).eval()
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=torch.tensor([text])).logits[:, 0] for text in TEXTS])
    torch.testing.assert_close(alone, scores(model, TEXTS), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_new_process_gives_the_same_rewards(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True, **WAYS["lora"])
    train_reward(model)
    folder = save(model, tmp_path / "saved", tiny_llama)
    program = (
        "import torch; from align.batches import Batch; from align.models.loading import load_reward\n"
        "from align.models.rewards import reward_scores; from align.models.source import source_of\n"
        f"ids = torch.tensor([{TEXTS[0]}]); ones = torch.ones_like(ids)\n"
        f"print(float(reward_scores(load_reward(source_of({str(folder)!r})), Batch(ids, ones, ones.bool()))))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(said.stdout) == pytest.approx(float(scores(model, TEXTS[:1])), abs=1e-5)


def test_a_reward_model_goes_on_with_its_own_head_and_a_language_model_gets_a_seeded_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    one, two, other = (load_reward(source_of(tiny_llama), trainable=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.score.weight, two.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one.score.weight.std().item() == pytest.approx(64**-0.5, rel=0.3)
    train_reward(one)
    again = load_reward(source_of(save(one, tmp_path / "saved", tiny_llama)), trainable=True, seed=9)
    assert torch.equal(again.score.weight, one.score.weight)


def test_a_language_model_gives_no_rewards_and_a_reward_model_no_text(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="no trained reward head"):
        require_reward(source_of(tiny_llama))
    with pytest.raises(AlignError, match="no trained reward head"):
        load_reward(source_of(tiny_llama))
    model = load_reward(source_of(tiny_llama), trainable=True)
    with pytest.raises(AlignError, match="writes no text"):
        load_policy(source_of(save(model, tmp_path / "saved", tiny_llama)))


def test_a_policys_adapter_has_to_be_merged_before_it_becomes_a_reward_model(tiny_llama: Path, tmp_path: Path) -> None:
    policy = load_policy(source_of(tiny_llama), trainable=True, **WAYS["lora"])
    with pytest.raises(AlignError, match="Merge it first"):
        load_reward(source_of(save(policy, tmp_path / "saved", tiny_llama)), trainable=True)


def test_a_reward_adapter_on_a_bfloat16_base_trains_its_head_in_float32(tiny_llama: Path) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True, precision="bfloat16", **WAYS["lora"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = snapshot(model)
    train_reward(model, steps=20)
    assert all(torch.equal(p, before[name]) != p.requires_grad for name, p in model.named_parameters())


def test_a_row_without_tokens_has_no_reward(tiny_llama: Path) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True).eval()
    with pytest.raises(ValueError, match="without tokens"):
        scores(model, [[1, 2], []])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rewards_are_float32_in_every_precision(tiny_llama: Path, tmp_path: Path, precision: str) -> None:
    model = load_reward(source_of(tiny_llama), trainable=True)
    source = source_of(save(model, tmp_path / "saved", tiny_llama))
    values = scores(load_reward(source, precision=precision), TEXTS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values, scores(model.eval(), TEXTS), atol=0.05 if precision == "bfloat16" else 1e-6, rtol=0
    )
