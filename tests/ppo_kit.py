"""Small ppo runs for the tests: settings, inputs and prompts around tiny models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.chat.templates import prepare_tokenizer
from align.data.examples import Message, Prompt
from align.data.prepared import DataReport, PreparedData
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.saving import save_checkpoint
from align.models.source import Source, source_of
from align.progress import Progress
from align.recipe.settings import AdapterSettings, EvaluationSettings, PpoSettings
from align.stages.stage import Inputs, RewardInput

WORDS = ("heron", "pier", "figs", "key", "boat", "sea", "dawn", "master")


def prompts(count: int = 8) -> list[Prompt]:
    """Prompts of different lengths."""
    return [
        Prompt((Message("user", " ".join(WORDS[: 1 + number % 5]) + f" {number}"),), {"answer": str(number)})
        for number in range(count)
    ]


def settings(**changes: Any) -> PpoSettings:
    """A run of two rounds of eight responses; rewards the letter e."""
    plain: dict[str, Any] = {
        "kind": "ppo", "prompts": "x", "reward": {"kind": "regex", "pattern": "e"}, "rollouts": 8, "rounds": 2,
        "round_epochs": 2, "batch_size": 4, "max_new_tokens": 6, "learning_rate": 1e-3, "precision": "float32",
        "missing_stop_penalty": 0.0, "log_steps": 1,
    }  # fmt: skip
    return PpoSettings.model_validate(plain | changes)


def inputs(parent: Path, work: Path, rewards: Mapping[str, Path] | None = None, **changes: Any) -> Inputs:
    """What the stage gets; `rewards` are folders of reward models."""
    rows = changes.pop("rows", prompts())
    plain: dict[str, Any] = {
        "parent": source_of(parent), "parent_id": "p", "data": PreparedData("prompt", rows, rows[:3], DataReport()),
        "questions": rows[:3], "judge": None, "template": None, "seed": 0,
        "evaluation": EvaluationSettings(max_new_tokens=6, rows=3, samples=2), "work": work / "state",
        "cache": work / "cache",
        "rewards": {name: RewardInput(source_of(folder), name) for name, folder in (rewards or {}).items()},
    }  # fmt: skip
    return Inputs(**(plain | changes))


def adapter_of(base: Path, folder: Path, *, quantize: Any = None, seed: int = 1, **adapter: Any) -> Path:
    """A policy's adapter that has learnt something: its B is not 0."""
    settings = AdapterSettings(**({"rank": 4} | adapter))
    model: Any = load_policy(
        source_of(base), adapter=settings, trainable=True, quantize=quantize, precision="float32", seed=seed
    )
    return _saved(model, base, folder, seed)


def reward_of(base: Path, folder: Path, *, adapter: bool = False, quantize: Any = None, seed: int = 3) -> Path:
    """A reward model with a random head; as an adapter with a random B where asked."""
    model: Any = load_reward(
        source_of(base), adapter=AdapterSettings(rank=4) if adapter else None, trainable=True, quantize=quantize,
        precision="float32", seed=seed,
    )  # fmt: skip
    return _saved(model, base, folder, seed)


def _saved(model: Any, base: Path, folder: Path, seed: int) -> Path:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save_checkpoint(model, load_tokenizer(source_of(base)), folder)
    return folder


class Listener(Progress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.log: list[tuple[int, dict[str, float]]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.log.append((step, dict(values)))

    def rewind(self, step: int) -> None:
        self.log = [(at, values) for at, values in self.log if at <= step]

    def series(self, name: str) -> list[float]:
        """All values of one number, in order."""
        return [values[name] for _, values in self.log if name in values]


def weights_of(source: Source) -> Any:
    """All weights of a saved checkpoint's own file, as one vector."""
    import torch
    from safetensors.torch import load_file

    files = sorted(Path(source.path).glob("*.safetensors"))
    return torch.cat([tensor.flatten().float() for file in files for _, tensor in sorted(load_file(file).items())])


def chat_base(base: Path, folder: Path) -> Path:
    """The model with a chat template, and room for the template's tokens."""
    tokenizer = load_tokenizer(source_of(base))
    prepare_tokenizer(tokenizer, None)
    save_checkpoint(load_policy(source_of(base), tokenizer=tokenizer, precision="float32"), tokenizer, folder)
    return folder
