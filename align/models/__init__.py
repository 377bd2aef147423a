"""Models: what a folder is, how it is opened, adapted, quantized, merged and saved. Names resolve on first use,
so that `source`, which needs no torch, can be imported alone.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.models.hardware import compute_dtype, device
    from align.models.loading import (
        load_policy,
        load_reward,
        load_tokenizer,
        model_config,
        require_reward,
        trainable_parameters,
    )
    from align.models.merging import MergeVerdict, materialize, merge
    from align.models.rewards import reward_scores
    from align.models.saving import save_checkpoint
    from align.models.source import Source, source_of

# Said at import, by whichever library brings bitsandbytes in first: an inference kernel of the hub is absent. It is one
# that `quantized` keeps switched off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "source": ("Source", "source_of"),
    "hardware": ("compute_dtype", "device"),
    "loading": (
        "load_policy",
        "load_reward",
        "load_tokenizer",
        "model_config",
        "require_reward",
        "trainable_parameters",
    ),
    "rewards": ("reward_scores",),
    "saving": ("save_checkpoint",),
    "merging": ("MergeVerdict", "materialize", "merge"),
}

__all__ = [
    "MergeVerdict",
    "Source",
    "compute_dtype",
    "device",
    "load_policy",
    "load_reward",
    "load_tokenizer",
    "materialize",
    "merge",
    "model_config",
    "require_reward",
    "reward_scores",
    "save_checkpoint",
    "source_of",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds a name when the name is first asked for."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"align.models.{module}"), name)
    raise AttributeError(f"module 'align.models' has no attribute '{name}'")
