"""What is refused before anything trains: adapters that do not fit, damaged weights, wishes that contradict."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import AlignError, StageFailed
from align.models.folders import model_config
from align.models.loading import load_policy, trainable_parameters
from align.models.source import source_of
from align.recipe.settings import AdapterSettings
from tests.test_models_training import WAYS, logits, save, train


@pytest.fixture
def saved_adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "own-base"))
    model = load_policy(source_of(base), trainable=True, **WAYS["lora"])
    train(model)
    return save(model, tmp_path / "adapter", base)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})


def test_adapter_keys_that_fit_nothing_are_refused(saved_adapter: Path) -> None:
    rewrite(
        saved_adapter / "adapter_model.safetensors", lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()}
    )
    with pytest.raises(AlignError, match="fit nothing in the base"):
        load_policy(source_of(saved_adapter))


def test_an_adapter_that_lost_a_weight_is_refused(saved_adapter: Path) -> None:
    rewrite(saved_adapter / "adapter_model.safetensors", lambda t: dict(list(t.items())[1:]))
    with pytest.raises(AlignError, match="1 are missing"):
        load_policy(source_of(saved_adapter))


def test_another_base_of_the_same_shape_is_refused(saved_adapter: Path, tmp_path: Path) -> None:
    rewrite(tmp_path / "own-base" / "model.safetensors", lambda t: {k: v + 0.01 for k, v in t.items()})
    with pytest.raises(AlignError, match="trained on other weights"):
        load_policy(source_of(saved_adapter))


def test_a_base_of_another_shape_is_refused(saved_adapter: Path, tmp_path: Path, tiny_gpt2: Path) -> None:
    shutil.rmtree(tmp_path / "own-base")
    shutil.copytree(tiny_gpt2, tmp_path / "own-base")
    (saved_adapter / "align_adapter.json").unlink()
    with pytest.raises(AlignError, match="adapter"):
        load_policy(source_of(saved_adapter))


def test_missing_and_damaged_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    rewrite(folder / "model.safetensors", lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k})
    with pytest.raises(AlignError, match="up_proj"):
        load_policy(source_of(folder))
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(AlignError, match="cannot be opened"):
        load_policy(source_of(folder))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"quantize": "nf4"}, "freezes the base"),
        ({"adapter": AdapterSettings(target="q_porj")}, "Did you mean 'q_proj'"),
        ({"adapter": AdapterSettings(target=["q_proj", "lm_head"])}, "lm_head"),
        ({"adapter": AdapterSettings(init="pissa"), "quantize": "nf4"}, "pissa"),
        ({"adapter": AdapterSettings(init="pissa", dora=True)}, "pissa"),
    ],
)
def test_what_cannot_be_combined_is_refused(tiny_llama: Path, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(AlignError, match=words):
        load_policy(source_of(tiny_llama), trainable=True, **keywords)


def test_an_adapter_on_an_adapter_or_on_another_quantization_is_refused(saved_adapter: Path) -> None:
    with pytest.raises(AlignError, match="another `adapter:`"):
        load_policy(source_of(saved_adapter), trainable=True, **WAYS["lora"])
    with pytest.raises(AlignError, match="asked for on one in nf4"):
        load_policy(source_of(saved_adapter), quantize="nf4")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        RuntimeError("unable to mmap 514602288 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        torch.OutOfMemoryError("Tried to allocate 20.00 GiB"),
        MemoryError("Cannot allocate memory (os error 12)"),
    ],
)
def test_memory_that_is_short_while_a_model_is_opened_is_no_fault_of_its_folder(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_memory)
    with pytest.raises(StageFailed, match=f"out of memory while {tiny_llama} was opened") as failure:
        load_policy(source_of(tiny_llama))
    assert failure.value.__cause__ is error


def test_training_from_scratch_needs_only_a_config_and_a_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "shape"))
    (folder / "model.safetensors").unlink()
    source = source_of(folder, needs_weights=False)
    one, two = (load_policy(source, from_scratch=True, trainable=True, seed=5) for _ in range(2))
    assert torch.equal(logits(one), logits(two))
    assert trainable_parameters(one) == sum(p.numel() for p in one.parameters())
    assert model_config(source).hidden_size == 64
    assert not torch.equal(logits(one), logits(load_policy(source_of(tiny_llama))))
