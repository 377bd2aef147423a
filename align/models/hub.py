"""Brings a hub model here. The only place in the project where a model may use the network (never with HF_HUB_OFFLINE)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from align.errors import AlignError
from align.models.source import Source, source_of

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def located(source: Source) -> Source:
    """The same source as a local folder; downloads a hub model unless HF_HUB_OFFLINE is set or the cache has it."""
    if Path(source.path).is_dir():
        return source
    found = source_of(_download(source), trust_remote_code=source.trust_remote_code)
    commit = Path(found.path).name  # the cache keeps each commit in a folder of its name
    return replace(found, revision=commit, hub_id=source.path)


def _download(source: Source) -> str:

    code = ["*.py"] if source.trust_remote_code else []
    try:
        return snapshot_download(
            source.path, revision=source.revision, allow_patterns=[*HUB_FILES, *code],
            ignore_patterns=["*/*", "consolidated*"],
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AlignError(
            f"{source.path}: no such folder, and the hub did not give it ({str(error).strip().splitlines()[0]})",
            "Check the name and `revision:`, log in for a gated model (hf auth login), or download it first if this "
            "machine is offline.",
        ) from error
