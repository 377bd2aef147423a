"""Libraries that talk too much while stages work: only their errors get through."""

from __future__ import annotations

import logging
import warnings

TALKATIVE = ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "torch.distributed")


def libraries_quiet() -> None:
    """Keep warnings and progress bars of the libraries off the terminal; align says itself what matters."""
    for name in TALKATIVE:  # before the import below, during which some of them speak
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|bitsandbytes)\b.*")
