"""Sizes of a decoder, read off its config. Llama-like ones are counted exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.recipe.training_settings import AdapterSettings


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder that decide memory and time."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    attention: int  # width of all query heads
    key_value: int  # width of all key heads
    tied: bool
    head: int = 64  # width of one head
    stored: int = 4  # bytes of a weight in the model's files
    plain_head: bool = (
        True  # whether the head's logits are used as they are; Gemma caps them, Granite and Cohere scale them
    )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """Shape behind a config.json; None when it lacks the usual names."""
        config = config.get("text_config", config)
        hidden = config.get("hidden_size") or config.get("n_embd")
        layers = config.get("num_hidden_layers") or config.get("n_layer")
        heads = config.get("num_attention_heads") or config.get("n_head")
        if not (hidden and layers and heads and config.get("vocab_size")):
            return None
        width = config.get("head_dim") or hidden // heads
        return cls(
            hidden=hidden,
            layers=layers,
            intermediate=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
            vocabulary=config["vocab_size"],
            attention=heads * width,
            key_value=(config.get("num_key_value_heads") or heads) * width,
            tied=bool(config.get("tie_word_embeddings", True)),
            head=width,
            stored=2 if (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else 4,
            plain_head=config.get("final_logit_softcapping") is None
            and all((config.get(factor) or 1) == 1 for factor in ("logit_scale", "logits_scaling")),
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """In and out widths of the linear layers of one block (gated feed-forward), by the name that Llama gives them."""
        h, m = self.hidden, self.intermediate
        return {
            "q_proj": (h, self.attention), "k_proj": (h, self.key_value), "v_proj": (h, self.key_value),
            "o_proj": (self.attention, h), "gate_proj": (h, m), "up_proj": (h, m), "down_proj": (m, h),
        }  # fmt: skip

    @property
    def block_parameters(self) -> int:
        """Weights of all linear layers of all blocks."""
        return self.layers * sum(i * o for i, o in self.matrices.values())

    @property
    def table(self) -> int:
        """Weights of the embeddings, and of the head as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights of the language model."""
        return self.classifier_parameters + (0 if self.tied else self.table)

    @property
    def classifier_parameters(self) -> int:
        """All weights of a reward model of this shape, which has one row in the place of the language model's head."""
        return self.block_parameters + self.table + (2 * self.layers + 1) * self.hidden

    def adapter_parameters(self, adapter: AdapterSettings) -> int:
        """Weights of a LoRA adapter."""
        wanted = [adapter.target] if isinstance(adapter.target, str) else adapter.target
        widths = [
            i + o for name, (i, o) in self.matrices.items()
            if "all-linear" in wanted or any(name.endswith(ending) for ending in wanted)
        ]  # fmt: skip
        return self.layers * adapter.rank * sum(widths)
