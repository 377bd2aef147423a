"""What trains moves, what is frozen does not, and what is saved is what was trained: for every way to train a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.models.folders import load_tokenizer
from align.models.loading import load_policy, trainable_parameters
from align.models.quantized import dequantized_weights
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.recipe.settings import AdapterSettings

IDS = torch.arange(5, 85).reshape(4, 20)
RANK = 4

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": AdapterSettings(rank=RANK)},
    "rslora": {"adapter": AdapterSettings(rank=RANK, rslora=True)},
    "dora": {"adapter": AdapterSettings(rank=RANK, dora=True)},
    "pissa": {"adapter": AdapterSettings(rank=RANK, init="pissa")},
    "pissa-rslora": {"adapter": AdapterSettings(rank=RANK, init="pissa", rslora=True, alpha=3.0)},
    "gaussian": {"adapter": AdapterSettings(rank=RANK, init="gaussian", target=["q_proj", "v_proj"])},
    "nf4": {"quantize": "nf4", "adapter": AdapterSettings(rank=RANK)},
    "nf4-dora": {"quantize": "nf4", "adapter": AdapterSettings(rank=RANK, dora=True)},
    "int8": {"quantize": "int8", "adapter": AdapterSettings(rank=RANK)},
    "int8-dora": {"quantize": "int8", "adapter": AdapterSettings(rank=RANK, dora=True)},
    "bfloat16-dora": {"precision": "bfloat16", "adapter": AdapterSettings(rank=RANK, dora=True)},
}


def loss(model: Any) -> torch.Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


def logits(model: Any) -> torch.Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        values = model(IDS, use_cache=False).logits.float()
    model.train(was_training)
    return values


def train(model: Any, steps: int = 3, rate: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss(model).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def save(model: Any, folder: Path, source: Path) -> Path:
    save_checkpoint(model, load_tokenizer(source_of(source)), folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_all_that_trains_moves_and_nothing_else(tiny_llama: Path, way: str) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS[way])
    before, training = snapshot(model), {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model, steps=20 if way == "bfloat16-dora" else 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == training
    assert trainable_parameters(model) == sum(before[name].numel() for name in training)
    if "dora" in way:
        assert any("magnitude" in name for name in training)


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_checkpoint_gives_the_logits_that_were_trained(tiny_llama: Path, tmp_path: Path, way: str) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS[way])
    train(model)
    saved = source_of(save(model, tmp_path / "saved", tiny_llama))
    again = load_policy(saved, precision=WAYS[way].get("precision", "auto"))
    assert not again.training
    assert trainable_parameters(again) == 0
    assert saved.quantize == WAYS[way].get("quantize")
    torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("way", ["full", "lora", "rslora", "dora", "pissa", "pissa-rslora"])
def test_plain_libraries_open_it_with_the_same_logits(tiny_llama: Path, tmp_path: Path, way: str) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS[way])
    train(model)
    folder = save(model, tmp_path / "saved", tiny_llama)
    plain = AutoModelForCausalLM.from_pretrained(folder if way == "full" else tiny_llama)
    if way != "full":
        plain = PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(logits(plain), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("way", ["lora", "dora", "pissa", "nf4", "int8"])
def test_an_adapter_goes_on_training_where_it_stopped(tiny_llama: Path, tmp_path: Path, way: str) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS[way])
    train(model)
    saved = source_of(save(model, tmp_path / "saved", tiny_llama))
    again = load_policy(saved, trainable=True)
    start = logits(again)
    torch.testing.assert_close(start, logits(model), atol=2e-5, rtol=0)
    before = snapshot(again)
    train(again)
    assert {name for name, p in again.named_parameters() if not torch.equal(p, before[name])} == {
        name for name, p in again.named_parameters() if p.requires_grad
    }
    final = source_of(save(again, tmp_path / "final", tiny_llama))
    torch.testing.assert_close(logits(load_policy(final)), logits(again), atol=2e-5, rtol=0)
    assert (final.quantize, final.root.path) == (saved.quantize, str(tiny_llama))


def test_the_same_training_writes_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = load_policy(source_of(tiny_llama), trainable=True, seed=7, **WAYS["lora"])
        train(model)
        save(model, tmp_path / name, tiny_llama)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_seeds_decide_the_adapter_and_leave_the_global_generator_alone(tiny_llama: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two, other = (
        snapshot(load_policy(source_of(tiny_llama), trainable=True, seed=seed, **WAYS["lora"])) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# Quantized bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["nf4", "nf4-dora", "int8", "int8-dora"])
def test_an_evaluation_changes_no_gradient_of_a_quantized_base(tiny_llama: Path, way: str) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, **WAYS[way])
    train(model)
    before = gradients(model)
    logits(model)
    after = gradients(model)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=0, rtol=1e-6)


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_training_with_an_evaluation_between_equals_training_without(tiny_llama: Path, way: str) -> None:
    results = []
    for evaluate in (True, False):
        model = load_policy(source_of(tiny_llama), trainable=True, **WAYS[way])
        train(model, steps=2)
        if evaluate:
            logits(model)
        train(model, steps=2)
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dequantized_weights_are_the_model_that_was_trained(tiny_llama: Path, quantize: Any) -> None:
    small = load_policy(source_of(tiny_llama), quantize=quantize)
    whole: Any = load_policy(source_of(tiny_llama))
    original = logits(whole)
    weights = dequantized_weights(small)
    assert len(weights) == 14
    for name, weight in weights.items():
        whole.get_submodule(name).weight.data.copy_(weight)
    seen = logits(small)
    torch.testing.assert_close(logits(whole), seen, atol=1e-5, rtol=0)
    assert (original - seen).abs().max() > 1e-4, "quantization must have changed something"
    small.train()
    assert torch.equal(logits(small), seen)


def test_widths_that_are_no_multiple_of_64_work_in_4_bits(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=100, vocab_size=320
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    tiny_tokenizer.save_pretrained(tmp_path / "odd")
    model = load_policy(source_of(tmp_path / "odd"), trainable=True, **WAYS["nf4"])
    before = gradients(model)
    logits(model)
    assert all(torch.equal(gradient, gradients(model)[name]) for name, gradient in before.items())


def test_gpt2_trains_in_4_bits_though_its_weights_lie_the_other_way(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = load_policy(source_of(tiny_gpt2), trainable=True, **WAYS["nf4"])
    train(model)
    saved = source_of(save(model, tmp_path / "saved", tiny_gpt2))
    torch.testing.assert_close(logits(load_policy(saved)), logits(model), atol=2e-5, rtol=0)


# Precision, checkpointing, dropout -----------------------------------------------------------------------------------


@pytest.fixture
def bfloat16_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(source_of(tiny_llama)).save_pretrained(folder)
    return folder


def test_a_bfloat16_checkpoint_trains_in_float32_and_every_norm_weight_moves(bfloat16_llama: Path) -> None:
    model = load_policy(source_of(bfloat16_llama), trainable=True)
    before = snapshot(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(model, steps=50, rate=1e-5)
    norms = [name for name in before if "norm" in name]
    moved = torch.cat([(model.get_parameter(name) != before[name]).float().flatten() for name in norms])
    assert moved.mean() >= 0.99


def test_adapters_on_a_bfloat16_base_stay_float32(bfloat16_llama: Path, tmp_path: Path) -> None:
    model = load_policy(source_of(bfloat16_llama), trainable=True, precision="bfloat16", **WAYS["lora"])
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    folder = save(model, tmp_path / "saved", bfloat16_llama)
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert source_of(folder).dtype == "bfloat16"


@pytest.mark.parametrize("way", ["lora", "dora", "nf4", "full"])
def test_gradient_checkpointing_changes_no_gradient(tiny_llama: Path, way: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = load_policy(source_of(tiny_llama), trainable=True, gradient_checkpointing=checkpointing, **WAYS[way])
        train(model, steps=1)
        found.append((loss(model).detach(), gradients(model)))
    (one_loss, one), (two_loss, two) = found
    torch.testing.assert_close(one_loss, two_loss, atol=1e-6, rtol=0)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-5, rtol=1e-4)
        assert gradient.abs().max() > 0, name


def test_dropout_is_off_unless_asked_for_and_the_config_keeps_it(tiny_gpt2: Path) -> None:
    quiet: Any = load_policy(source_of(tiny_gpt2), trainable=True)
    assert torch.equal(loss(quiet), loss(quiet))
    assert quiet.config.attn_pdrop == 0.1
    noisy = load_policy(source_of(tiny_gpt2), trainable=True, dropout=True)
    assert not torch.equal(loss(noisy), loss(noisy))


@pytest.mark.parametrize("way", ["full", "lora"])
def test_dropout_that_a_module_keeps_as_a_number_is_off_too(tiny_llama: Path, tmp_path: Path, way: str) -> None:
    """As the attention of Llama does, which has no module for it."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    quiet: Any = load_policy(source_of(folder), trainable=True, **WAYS[way])
    assert torch.equal(loss(quiet), loss(quiet))
    assert quiet.config.attention_dropout == 0.5
    noisy = load_policy(source_of(folder), trainable=True, dropout=True, **WAYS[way])
    assert not torch.equal(loss(noisy), loss(noisy))


def test_dropout_of_a_new_adapter_is_as_its_settings_say_and_off_in_a_continued_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = load_policy(source_of(tiny_llama), trainable=True, adapter=AdapterSettings(rank=RANK, dropout=0.5))
    train(model)
    assert not torch.equal(loss(model), loss(model))
    again = load_policy(source_of(save(model, tmp_path / "saved", tiny_llama)), trainable=True)
    assert torch.equal(loss(again), loss(again))
