"""Where a model runs and in which arithmetic. Two questions, answered the same way for training, scoring and merging."""

from __future__ import annotations

import os
from typing import Any

import torch

# Measured on AMX and AVX-512-bf16 (a Llama training step of 8 x 64 tokens, one thread; float32 / bfloat16 autocast):
# width 64: 31 / 48 ms, 128: 55 / 67, 192: 182 / 160, 288: 362 / 248, 512: 751 / 545, 768: 1114 / 715.
BFLOAT16_MIN_WIDTH = 256


def device() -> torch.device:
    """This process's accelerator, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(precision: str, width: int | None = None) -> torch.dtype:
    """Arithmetic for 'float32', 'bfloat16' or 'auto': bfloat16 where the processor has it and the model gains by it.

    width: hidden size; on a CPU, converting costs more than it saves below 256. None: taken to be wide.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    wide = width is None or width >= BFLOAT16_MIN_WIDTH
    return torch.bfloat16 if wide and _cpu_has_bfloat16() else torch.float32


def width_of(config: Any) -> int:
    """Hidden size of a model, also of the text part of one that sees or hears."""
    return int(config.get_text_config().hidden_size)


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
