"""Tokenizers and configs without torch: importing it, with all that transformers then imports for models, costs seconds.

transformers opens both by the same code where torch is not installed. It is told so in a process that builds no model;
whoever imports torch there still gets it.
"""

from __future__ import annotations

import sys

OWN_PROCESS = "the process belongs to this command"  # the commands' context object, when the shell started them


def keep_torch_out() -> None:
    """Lets transformers go without torch until the process ends, unless something has imported torch already."""
    if "torch" in sys.modules:
        return
    from transformers import utils

    for module in (utils, utils.import_utils):
        module.is_torch_available = _not_available


def _not_available() -> bool:
    return False
