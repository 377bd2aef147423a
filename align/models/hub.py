"""Brings a hub model here. The only place in the project where a model may use the network (never with HF_HUB_OFFLINE)."""

from __future__ import annotations

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from align.errors import AlignError

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def download(name: str, revision: str | None, *, with_code: bool) -> str:
    """Folder of a hub model's files at a revision, from the cache where it has them.

    Raises AlignError when the hub cannot be reached, does not know it, or wants a login.
    """
    code = ["*.py"] if with_code else []
    try:
        return snapshot_download(
            name, revision=revision, allow_patterns=[*HUB_FILES, *code], ignore_patterns=["*/*", "consolidated*"]
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AlignError(
            f"{name}: no such folder, and the hub did not give it ({str(error).strip().splitlines()[0]})",
            "Check the name and `revision:`, log in for a gated model (hf auth login), or download it first if this "
            "machine is offline.",
        ) from error
