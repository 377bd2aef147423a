"""Libraries that talk too much while commands work: only their errors get through; align says itself what matters."""

from __future__ import annotations

import logging
import os
import warnings

TALKATIVE = ("peft", "trl", "accelerate", "bitsandbytes", "datasets", "torch.distributed")


def quiet_libraries() -> None:
    """Called before any of them is imported; imports none of them itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets the level of its own logger when it is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|bitsandbytes)\b.*")
