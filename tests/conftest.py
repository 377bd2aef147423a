"""Fixtures that every test file shares: where real data lies, and tiny models made on the spot."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with Ctrl-C ignored

TEXT = [
    "The heron came to the pier at dawn and carried six crates of figs.",
    "Who has the key? The master of the harbour has it, and he keeps it well.",
    "system user assistant tool: hello, world! 0123456789 (yes) [no] {maybe} <b>",
    "Once upon a time there was a small boat that wanted to see the sea.",
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and a small pretrained model, kept beside the project."""
    folder = Path(os.environ.get("ALIGN_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set ALIGN_SHARED to its folder ({folder} does not exist)")
    return folder


@pytest.fixture(autouse=True)
def align_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a registry of its own."""
    home = tmp_path / "align-home"
    monkeypatch.setenv("ALIGN_HOME", str(home))
    monkeypatch.delenv("ALIGN_REGISTRY_URL", raising=False)
    return home


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with about 300 tokens, <pad> <s> </s>, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """Folder of a 2-layer, 64-wide Llama with random weights and the tiny tokenizer; context 256."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=len(tiny_tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _save(LlamaForCausalLM(config), tiny_tokenizer, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """Folder of a 2-layer GPT-2: absolute positions, dropout 0.1."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=len(tiny_tokenizer),
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _save(GPT2LMHeadModel(config), tiny_tokenizer, tmp_path_factory.mktemp("tiny-gpt2"))


def _save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
