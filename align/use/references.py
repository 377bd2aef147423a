"""What a user writes for a checkpoint -> weights that may be used: a folder, or a name of the registry, checked.

A registered checkpoint is refused when its files, its base's files or its chat template are not what was recorded.
"""

from __future__ import annotations

from pathlib import Path

from align.errors import AlignError
from align.models.source import Source, source_of
from align.registry.records import CheckpointRecord
from align.registry.store import Registry


def resolve(reference: str, *, trust_remote_code: bool = False) -> Source:
    """The source behind a model folder, recipe/stage[@id], a tag, or the beginning of an id.

    An existing folder goes before a name. Raises AlignError when there is neither, and when a registered checkpoint
    has changed.
    """
    if Path(reference).expanduser().is_dir() or reference.startswith((".", "/", "~")):
        return source_of(reference, trust_remote_code=trust_remote_code)
    registry = Registry.open(create=False)
    try:
        record = registry.checkpoint(reference)
    except AlignError as error:
        raise AlignError(error.message, f"{error.hint} A folder of that name is not there either.".strip()) from error
    registry.check_unchanged(record)
    source = source_of(record.path, trust_remote_code=trust_remote_code)
    if source.base is not None:
        registry.check_folder(Path(source.base.path))
    _check_template(record, source)
    return source


def _check_template(record: CheckpointRecord, source: Source) -> None:
    """The tokenizer renders chats with the template that the checkpoint was trained with."""
    if record.template_sha256 is None:
        return
    from align.chat.templates import template_sha256
    from align.models.folders import load_tokenizer

    found = template_sha256(load_tokenizer(source))
    if found != record.template_sha256:
        raise AlignError(
            f"{record.name} ({record.id[:12]}): its chat template ({found[:12]}) is not the one it was trained with "
            f"({record.template_sha256[:12]})",
            "Put the tokenizer's files back, or make the checkpoint again with --force.",
        )
