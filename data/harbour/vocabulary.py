"""The harbour's tokenizer: one token for each word of this world, single bytes for everything else.

A Unigram model over byte-level text: its words are listed, not learnt, so a word is one token however rare it is, and
whatever a user types is still spelt out in bytes. It has the tokens of align's own chat template and no template.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
BYTE_SCORE = -30.0  # far below every word's log-probability: bytes only where no word fits


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each word stands in the texts, in byte-level spelling: a space belongs to the word behind it."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))


def write_tokenizer(counts: Counter[str], folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; returns the number of tokens."""
    special = (PAD, BOS, EOS, *ROLES)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(word for word in counts if len(word) > 1)
    total = sum(counts.values())
    scores = {**dict.fromkeys((*special, *letters), BYTE_SCORE), **{w: math.log(counts[w] / total) for w in words}}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
        "extra_special_tokens": list(ROLES), "model_max_length": 512, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
