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
    has changed, by its path as by its name.
    """
    folder = Path(reference).expanduser()
    is_path = folder.is_dir() or reference.startswith((".", "/", "~"))
    record = _checked_folder(folder) if is_path else _checked_name(reference)
    source = source_of(reference if record is None else record.path, trust_remote_code=trust_remote_code)
    if source.base is not None:
        _checked_folder(Path(source.base.path))
    if record is not None:
        _check_template(record, source)
    return source


def _checked_folder(folder: Path) -> CheckpointRecord | None:
    """The checkpoint of the registry that a folder is, if it is one."""
    registry = Registry.around(folder) if folder.is_dir() else None
    return registry.check_folder(folder) if registry is not None else None


def _checked_name(reference: str) -> CheckpointRecord:
    registry = Registry.open(create=False)
    try:
        record = registry.checkpoint(reference)
    except AlignError as error:
        raise AlignError(error.message, f"{error.hint} A folder of that name is not there either.".strip()) from error
    registry.check_unchanged(record)
    return record


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
