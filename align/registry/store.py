"""The registry as everyone above sees it: one object, opened on a home folder, that remembers what was made from what."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import AlignError, did_you_mean
from align.registry import cleanup, queries
from align.registry.artifacts import NEW, discard, disk_errors_explained, problems
from align.registry.database import PostgresDatabase, SqliteDatabase
from align.registry.hashing import folder_manifest
from align.registry.identity import check_identity, tie
from align.registry.lineage import children_of
from align.registry.migrations import LATEST, migrate, refuse_newer
from align.registry.reader import Reader
from align.registry.records import CheckpointRecord, DataRecord, to_json
from align.registry.recovery import recover
from align.registry.references import (
    check_name,
    check_tag,
    ids_in,
)
from align.registry.registration import FOLDERS, Output, home_lock, now, register
from align.registry.run import Run


class Registry(Reader):
    """Data sets, checkpoints, runs and metrics of one home folder. `open` makes one; every operation is one transaction."""

    @classmethod
    def open(cls, home: Path | None = None, url: str | None = None, *, create: bool = True) -> Registry:
        """The registry of `home` (default: ALIGN_HOME, else .align here) and `url` (default: ALIGN_REGISTRY_URL).

        create: make folders and tables where they are missing; without it, a missing registry is an empty one.
        Raises AlignError when the folder cannot be written, the database does not answer, or the two do not belong together.
        """
        place = (home or _default_home()).absolute()
        address = url or os.environ.get("ALIGN_REGISTRY_URL")
        registry = cls(place, PostgresDatabase(address) if address else SqliteDatabase(place / "registry.db"))
        registry._prepare(create=create)
        return registry

    @classmethod
    def around(cls, folder: Path) -> Registry | None:
        """The default registry if `folder` lies among its checkpoints; for another folder it is not even opened."""
        return cls.open(create=False) if _place_in(_default_home(), folder) else None

    def make(self) -> None:
        """Makes folders and tables where they are missing, if it was opened without. Raises AlignError as `open`."""
        self._prepare(create=True)

    def _prepare(self, *, create: bool) -> None:
        version = self._checked_version()
        if create:
            _make_folders(self.home)
        if version < LATEST and (create or version > 0):
            with self._database.write() as connection:
                migrate(connection)
        if create:
            with disk_errors_explained(self.home):
                tie(self._database, self.home)

    def _checked_version(self) -> int:
        """The version of the database. Raises AlignError where it, or the folder, cannot be used or is another's."""
        try:
            if self.home.exists() and not self.home.is_dir():
                raise AlignError(f"{self.home} is a file, not a folder", "Set ALIGN_HOME to the folder of a registry.")
            version = self._database.version()
            refuse_newer(version)
            check_identity(self._database, self.home)
        except PermissionError as error:
            hint = "Check the permissions, or set ALIGN_HOME."
            raise AlignError(f"the registry in {self.home} cannot be read: {error.strerror}", hint) from error
        return version

    # Data sets

    def add_data(self, name: str, key: str, folder: Path, info: Mapping[str, Any]) -> DataRecord:
        """Moves `folder` into the registry under its content hash. What is there already under this name and key stays."""
        columns = {"name": check_name(name), "key": key, "info": to_json(info)}
        present = self.data_by_key(key)
        if present and present.name == name and present.id == folder_manifest(folder).id:
            self.check_unchanged(present)
            discard(folder)
            return present
        (number,) = register(self._database, self.home, [Output("datasets", folder, columns)], None)
        return self._datasets("d.number = :number", number=number)[0]

    def new_folder(self, what: str) -> Path:
        """An empty folder on the registry's disk, to be moved in later. what: `data`. gc sweeps one that was forgotten."""
        folder = self.home / what / f"{NEW}{os.urandom(8).hex()}"
        with disk_errors_explained(self.home):
            folder.mkdir()
        return folder

    # Runs

    def begin_run(
        self,
        *,
        recipe: str,
        stage: str,
        kind: str,
        key: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        seed: int,
    ) -> Run:
        """A new run, with its lock held. key: hash of all that decides the result; inputs: ids of what goes in."""
        run = Run(self._database, self.home, os.urandom(6).hex())
        run.begin({
            "recipe": check_name(recipe), "stage": check_name(stage), "kind": kind, "key": key, "seed": seed,
            "settings": to_json(settings), "inputs": to_json(inputs),
        })  # fmt: skip
        return run

    def resume_run(self, id_prefix: str) -> Run:
        """An unfinished run, taken up again. Raises AlignError when it is finished or runs in another process."""
        record = self.run(id_prefix)
        if record.status == "finished":
            raise AlignError(f"run {record.id} is finished; there is nothing to resume")
        run = Run(self._database, self.home, record.id)
        run.resume()
        return run

    def recover(self) -> list[str]:
        """Records results that were complete when their run was killed; returns the ids of those runs."""
        return recover(self._database, self.home)

    # Checkpoints

    def tag(self, reference: str, tag: str) -> CheckpointRecord:
        """Points `tag` to a checkpoint; a tag that exists moves. Raises AlignError when a checkpoint has that name."""
        from sqlalchemy import delete, insert

        from align.registry.schema import tags

        record = self.checkpoint(reference)
        check_tag(tag)
        if self._checkpoints("c.name = :name", name=tag):
            raise AlignError(f"'{tag}' is the name of a checkpoint", "Choose another tag.")
        with self._database.write() as connection:
            connection.execute(delete(tags).where(tags.c.tag == tag))
            connection.execute(insert(tags).values(tag=tag, checkpoint=record.number))
        return self.checkpoint(tag)

    def name_again(self, record: CheckpointRecord, name: str) -> CheckpointRecord:
        """The same checkpoint, registered once more as the newest of `name`; its files are not copied."""
        number = self._copy_of("checkpoints", record.number, name=check_name(name))
        return self._checkpoints("c.number = :number", number=number)[0]

    def name_data_again(self, record: DataRecord, name: str, info: Mapping[str, Any]) -> DataRecord:
        """The same data set, registered once more as the newest of `name` unless it is; its files are not copied."""
        newest = self._datasets("d.name = :name", name=name)
        if newest and newest[0].number == record.number:
            return record
        number = self._copy_of("datasets", record.number, name=check_name(name), info=to_json(info))
        return self._datasets("d.number = :number", number=number)[0]

    def _copy_of(self, table_name: str, number: int, **changes: Any) -> int:
        """Number of a new row that is like an older one but for the changes."""
        from sqlalchemy import func, insert, select

        from align.registry import schema

        table = schema.metadata.tables[table_name]
        with self._database.write() as connection:
            row = connection.execute(select(table).where(table.c.number == number)).mappings().one()
            latest: int = connection.execute(select(func.max(table.c.number) + 1)).scalar_one()
            connection.execute(insert(table).values({**row, "number": latest, "created": now(), **changes}))
        return latest

    def untag(self, tag: str) -> None:
        """Removes a tag; the checkpoint stays. Raises AlignError when there is no such tag."""
        from sqlalchemy import delete

        from align.registry.schema import tags

        known = {name for names in queries.tags_by_checkpoint(self._database).values() for name in names}
        if tag not in known:
            raise AlignError(f"no tag '{tag}'", did_you_mean(tag, known))
        with self._database.write() as connection:
            connection.execute(delete(tags).where(tags.c.tag == tag))

    # Integrity and space

    def verify(self, reference: str) -> list[str]:
        """Reads every byte of a checkpoint again; one sentence for each file that is not as registered."""
        record = self.checkpoint(reference)
        return problems(record.path, queries.manifest(self._database, record.id), thorough=True)

    def check_unchanged(self, record: CheckpointRecord | DataRecord) -> None:
        """Raises AlignError, naming the file, when an artifact is not as it was registered.

        Files whose inode, size and times are as recorded are trusted; all others are read again.
        """
        found = problems(record.path, queries.manifest(self._database, record.id), thorough=False)
        if found:
            what = "data set" if isinstance(record, DataRecord) else "checkpoint"
            raise AlignError(
                f"{what} {record.name} ({record.id[:12]}) was changed behind the registry's back: {found[0]}"
                + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""),
                f"Its files are in {record.path}. Put the original back, or make it again with --force.",
            )

    def check_folder(self, folder: Path) -> CheckpointRecord | None:
        """As `check_unchanged` for the checkpoint that lies in `folder`, if one does; returns its newest record."""
        found = self._checkpoints("a.path = :path", limit=1, path=_place_in(self.home, folder))
        for record in found:
            self.check_unchanged(record)
        return found[0] if found else None

    def remove(self, reference: str) -> CheckpointRecord:
        """Removes a checkpoint. Raises AlignError when something was made from it, uses it now, or a tag points to it."""
        self.checkpoint(reference)  # one that is not there is refused without a lock, which a missing home cannot hold
        with home_lock(self.home):
            record = self.checkpoint(reference)
            last = len(self._checkpoints("c.artifact = :id", id=record.id)) == 1
            self._refuse_needed(record, last=last)
            cleanup.delete_rows(self._database, [[record.number]], "checkpoints")
            if last:
                discard(record.path)
        return record

    def gc(self, dry_run: bool = False) -> list[cleanup.Removal]:
        """Removes what nothing needs (see cleanup) and returns it with the reasons; `dry_run`: only says so."""
        if not dry_run:
            self.recover()
        return cleanup.collect(self._database, self.home, dry_run=dry_run)

    def _refuse_needed(self, record: CheckpointRecord, *, last: bool) -> None:
        if record.tags:
            raise AlignError(f"{record.name} is tagged {', '.join(record.tags)}", "Untag it first.")
        if not last:
            return
        if children := children_of(self._database, self.home, record.id):
            names = ", ".join(f"{child.name}@{child.id[:8]}" for child in children)
            raise AlignError(f"{record.name}@{record.id[:8]} is the parent of {names}", "Remove those first.")
        users = [
            run.id for run in cleanup.pinning_runs(self._database, self.home) if record.id in ids_in(run.inputs_json)
        ]
        if users:
            raise AlignError(
                f"{record.name}@{record.id[:8]} is an input of run {', '.join(users)}, which is not finished"
            )


def _default_home() -> Path:
    return Path(os.environ.get("ALIGN_HOME") or ".align")


def _place_in(home: Path, folder: Path) -> str:
    """Where, as the registry writes it, the checkpoint would lie that `folder` may be; '' where none can lie."""
    place, checkpoints = folder.resolve(), FOLDERS["checkpoints"]
    return f"{checkpoints}/{place.name}" if place.parent == (home / checkpoints).resolve() else ""


def _make_folders(home: Path) -> None:
    with disk_errors_explained(home):
        for name in ("checkpoints", "data", "runs", "cache"):
            try:
                (home / name).mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
                hint = "Set ALIGN_HOME to a folder, or to where one can be made."
                raise AlignError(f"{home} cannot be made: {error.strerror}", hint) from error
