"""Transactions on the registry's database: SQLite beside the artifacts, or PostgreSQL for a team.

Writers come one after another on both (BEGIN IMMEDIATE; an advisory lock), so that what a transaction read is still true
when it writes. Readers never wait. Reading SQLite goes through the standard library alone: importing SQLAlchemy costs
more than twice the 0.3 s within which a listing should answer.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align.errors import AlignError, StageFailed
from align.registry.mounts import network_filesystem

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, Engine

BUSY_SECONDS = 60
ATTEMPTS = 5
WRITER_LOCK = 0x616C69676E  # 'align', the key of the advisory lock in PostgreSQL
UNDEFINED_TABLE = "42P01"  # SQLSTATE

Row = dict[str, Any]


class Database(Protocol):
    """What the registry needs from a database. Placeholders in SQL text are `:name`."""

    def version(self) -> int:
        """Number of the last migration; 0 for a blank or missing database."""

    def read(self, sql: str, **values: Any) -> list[Row]:
        """Rows of a query, by column name. A registry that does not exist yet has none."""

    def json_part(self, column: str, key: str) -> str:
        """SQL for the value of a key in a column of JSON text, as JSON text; NULL where there is none."""

    def write(self, *, durable: bool = True) -> AbstractContextManager[Connection]:
        """One transaction, alone; rolled back by an exception. durable: on disk when the block ends, power cut or not."""


class SqliteDatabase:
    """The embedded registry: one file, in WAL mode."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def version(self) -> int:
        """See Database."""
        if not self.read("SELECT name FROM sqlite_master WHERE name = 'migrations'"):
            return 0
        return int(self.read("SELECT coalesce(max(number), 0) AS number FROM migrations")[0]["number"])

    def read(self, sql: str, **values: Any) -> list[Row]:
        """See Database."""
        try:
            return self._rows(sql, values)
        except sqlite3.OperationalError as error:  # also where a process was killed, or is just busy, making the tables
            if "no such table" not in str(error) or self.version():
                raise
            return []

    def _rows(self, sql: str, values: Row) -> list[Row]:
        if not self._path.exists():
            return []
        if self._path.is_dir():
            raise AlignError(f"the registry {self._path} is a folder, not a file", "Remove it, or set ALIGN_HOME.")
        try:
            return self._select_even_read_only(sql, values)
        except sqlite3.OperationalError as error:
            raise _explained(self._path, error, "read") from error
        except sqlite3.DatabaseError as error:
            raise _damaged(self._path, error) from error

    def json_part(self, column: str, key: str) -> str:
        """See Database."""
        return f"json_extract({column}, '$.{key}')"

    def _refuse_unfinished_log(self) -> None:
        """Reading past the write-ahead log would show an old state as the present one."""
        log = self._path.with_name(f"{self._path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise AlignError(
                f"the registry {self._path} was not closed cleanly and its folder cannot be written",
                "Copy the folder to a place that can be written and set ALIGN_HOME to it.",
            )

    def _select_even_read_only(self, sql: str, values: Row) -> list[Row]:
        """A read-only disk has no room for the shared memory of the write-ahead log."""
        try:
            return self._select(sql, values, "mode=rw")
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error) and "unable to open" not in str(error):
                raise
            self._refuse_unfinished_log()
            return self._select(sql, values, "immutable=1")

    def _select(self, sql: str, values: Row, mode: str) -> list[Row]:
        address = f"{self._path.absolute().as_uri()}?{mode}"
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql, values)]

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Connection]:
        """See Database. Raises AlignError where the folder cannot be written, StageFailed where the disk is full."""
        from sqlalchemy.exc import DatabaseError

        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                _begin_immediate(connection)
                try:
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()
        except DatabaseError as error:
            raise _explained(self._path, error.orig or error, "written") from error

    @cached_property
    def _engine(self) -> Engine:
        from sqlalchemy import URL, create_engine, event

        self._path.parent.mkdir(parents=True, exist_ok=True)
        address = URL.create("sqlite", database=str(self._path))
        engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS})
        journal = "DELETE" if network_filesystem(self._path.parent) else "WAL"

        @event.listens_for(engine, "connect")
        def prepare(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
            connection.execute(f"PRAGMA journal_mode = {journal}")
            connection.execute("PRAGMA foreign_keys = ON")

        return engine


class PostgresDatabase:
    """A registry that a team shares. Artifacts stay in ALIGN_HOME, which has to be shared as well."""

    def __init__(self, url: str) -> None:
        self._url = url

    def version(self) -> int:
        """See Database."""
        if not self.read(
            "SELECT tablename FROM pg_tables WHERE tablename = 'migrations' AND schemaname = current_schema()"
        ):
            return 0
        return int(self.read("SELECT coalesce(max(number), 0) AS number FROM migrations")[0]["number"])

    def read(self, sql: str, **values: Any) -> list[Row]:
        """See Database."""
        from sqlalchemy import text
        from sqlalchemy.exc import ProgrammingError

        try:
            with self._connected() as connection:
                return [dict(row) for row in connection.execute(text(sql), values).mappings()]
        except ProgrammingError as error:
            if getattr(error.orig, "sqlstate", None) != UNDEFINED_TABLE or self.version():
                raise
            return []

    def json_part(self, column: str, key: str) -> str:
        """See Database."""
        return f"CAST({column} AS json) ->> '{key}'"

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Connection]:
        """See Database."""
        with self._connected() as connection, connection.begin():
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
            if not durable:
                connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            yield connection

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        from sqlalchemy.exc import OperationalError

        try:
            with self._engine.connect() as connection:
                yield connection
        except OperationalError as error:
            place = self._engine.url.render_as_string(hide_password=True)
            raise AlignError(
                f"the registry at {place} does not answer: {error.orig}", "Check ALIGN_REGISTRY_URL."
            ) from error

    @cached_property
    def _engine(self) -> Engine:
        from sqlalchemy import create_engine, make_url
        from sqlalchemy.exc import ArgumentError

        hint = "Write ALIGN_REGISTRY_URL=postgresql://user@host/database, or unset it to use SQLite in ALIGN_HOME."
        try:
            url = make_url(self._url)
        except ArgumentError as error:
            raise AlignError("ALIGN_REGISTRY_URL is not a database URL", hint) from error
        if url.get_backend_name() not in ("postgresql", "postgres"):
            raise AlignError(f"the registry cannot live in '{url.drivername}'; known: postgresql", hint)
        try:
            return create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise AlignError("PostgreSQL needs the package psycopg", "pip install 'align[postgres]'") from error


def _begin_immediate(connection: Connection) -> None:
    """Takes the write lock now: a lock asked for in mid-transaction is refused at once, whatever the timeout."""
    from sqlalchemy.exc import OperationalError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except OperationalError as error:
            if attempt == ATTEMPTS or "locked" not in str(error.orig):
                raise
            time.sleep(0.1 * attempt)
        else:
            return


def _explained(path: Path, error: BaseException, done: Literal["read", "written"]) -> BaseException:
    text = str(error)
    if "readonly" in text or "unable to open" in text:
        return AlignError(f"the registry {path} cannot be {done}: {text}", "Check the permissions, or set ALIGN_HOME.")
    if "disk is full" in text:
        return StageFailed(f"the registry {path} cannot be written: {text}", "Free some space; nothing was registered.")
    if "disk I/O" in text:
        return StageFailed(f"the registry {path} cannot be used: {text}", "Look at the disk; nothing was registered.")
    if "locked" in text:
        return StageFailed(f"the registry {path} stayed locked by another process for {BUSY_SECONDS} s", "Try again.")
    return _damaged(path, error) if "malformed" in text or "not a database" in text else error


def _damaged(path: Path, error: BaseException) -> AlignError:
    return AlignError(
        f"the registry {path} is damaged: {error}", "Restore it from a copy; the artifacts are untouched."
    )
