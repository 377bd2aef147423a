"""What stands beside the weights of a model: its tokenizer and its config. And how to read a folder without noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from align.errors import AlignError, StageFailed, lacks_memory
from align.models.source import Source, located

BAD_FOLDER = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; its base's where an adapter folder has none."""
    source = located(source)
    own = any((Path(source.path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(source if own else located(source.root))
    return tokenizer


def model_config(source: Source) -> Any:
    """The transformers config of a model, or of an adapter's base, without its weights."""
    return open_config(located(source.root))


def open_config(source: Source) -> Any:
    """The transformers config of a located source (of the base, for an adapter)."""
    root = source.root
    with errors_of(root.path), quiet():
        return AutoConfig.from_pretrained(
            root.path, trust_remote_code=root.trust_remote_code, local_files_only=True
        )  # fmt: skip


def open_tokenizer(source: Source) -> Any:
    """The tokenizer in the folder of a located source."""
    with errors_of(source.path), quiet():
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
        )  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its table of weights that were new: both are checked here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def errors_of(path: str) -> Iterator[None]:
    """What libraries raise for a bad folder, as our error. Running out of memory is no fault of the folder: StageFailed."""
    try:
        yield
    except (*BAD_FOLDER, MemoryError) as error:
        if lacks_memory(error):
            hint = "Free some memory, or take a smaller model; an adapter can be trained with quantize: nf4."
            raise StageFailed(f"out of memory while {path} was opened", hint) from error
        first = (str(error).strip().splitlines() or [""])[0]
        if not first or isinstance(error, LookupError | TypeError | AttributeError):  # a JSON file of another shape
            first = f"a file in it is not as it should be ({type(error).__name__}: {first})"
        hint = "Check the folder's files, or copy it again."
        if "trust_remote_code" in str(error):
            hint = "It runs Python code of its own: read it, then set `trust_remote_code: true` in the recipe."
        raise AlignError(f"{path}: cannot be opened: {first}", hint) from error
