"""Who writes the responses of a round: this process (`LocalEngine`), or vLLM beside it (`align.rollout.vllm`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from align.progress import Progress
from align.rollout.generation import Reply, Sampling, generate


class Engine(Protocol):
    """A generator that has weights of its own, or uses the trained ones in place."""

    def sync(self, model: nn.Module) -> None:
        """Give the generator the weights of the model as they are now; before the first round and after each."""

    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], sampling: Sampling, progress: Progress | None = None
    ) -> list[Reply]:
        """One reply for each prompt, in their order, with the log-probabilities that the generator computed."""


@dataclass(frozen=True)
class LocalEngine:
    """Generates with the trained model itself: nothing to sync."""

    tokenizer: Any
    stop_ids: Sequence[int]

    def sync(self, model: nn.Module) -> None:
        """Nothing to do."""

    def generate(
        self, model: nn.Module, prompts: Sequence[list[int]], sampling: Sampling, progress: Progress | None = None
    ) -> list[Reply]:
        """One reply for each prompt, in their order."""
        return generate(model, self.tokenizer, prompts, sampling, stop_ids=self.stop_ids, progress=progress)
