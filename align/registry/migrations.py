"""Numbered steps from an empty database to the present tables. A step that has been released is never edited.

The text is plain SQL that SQLite and PostgreSQL both take. A registry written by a newer align is refused, not guessed at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from align.errors import AlignError

if TYPE_CHECKING:
    from sqlalchemy import Connection

Migration = Callable[["Connection"], None]


def _tables(connection: Connection) -> None:
    for statement in (
        """CREATE TABLE artifacts (
            id TEXT NOT NULL PRIMARY KEY, path TEXT NOT NULL, size BIGINT NOT NULL, files TEXT NOT NULL,
            created TEXT NOT NULL)""",
        """CREATE TABLE runs (
            number INTEGER NOT NULL PRIMARY KEY, id TEXT NOT NULL UNIQUE, recipe TEXT NOT NULL, stage TEXT NOT NULL,
            kind TEXT NOT NULL, key TEXT NOT NULL, seed BIGINT NOT NULL, settings TEXT NOT NULL, inputs TEXT NOT NULL,
            status TEXT NOT NULL, message TEXT NOT NULL, host TEXT NOT NULL, started TEXT NOT NULL, ended TEXT)""",
        """CREATE TABLE datasets (
            number INTEGER NOT NULL PRIMARY KEY, artifact TEXT NOT NULL REFERENCES artifacts (id), name TEXT NOT NULL,
            key TEXT NOT NULL, info TEXT NOT NULL, run TEXT REFERENCES runs (id), created TEXT NOT NULL)""",
        """CREATE TABLE checkpoints (
            number INTEGER NOT NULL PRIMARY KEY, artifact TEXT NOT NULL REFERENCES artifacts (id), name TEXT NOT NULL,
            kind TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs (id), parents TEXT NOT NULL, data TEXT NOT NULL,
            template_sha256 TEXT, tokenizer_sha256 TEXT, metrics TEXT NOT NULL, samples TEXT NOT NULL,
            versions TEXT NOT NULL, created TEXT NOT NULL)""",
        """CREATE TABLE metrics (
            run TEXT NOT NULL REFERENCES runs (id), step INTEGER NOT NULL, name TEXT NOT NULL, value DOUBLE PRECISION,
            PRIMARY KEY (run, step, name))""",
        "CREATE TABLE identity (id TEXT NOT NULL PRIMARY KEY)",
        f"INSERT INTO identity (id) VALUES ('{os.urandom(8).hex()}')",
        "CREATE TABLE tags (tag TEXT NOT NULL PRIMARY KEY, checkpoint INTEGER NOT NULL REFERENCES checkpoints (number))",
    ):
        connection.exec_driver_sql(statement)


def _indexes(connection: Connection) -> None:
    for table, column in (
        ("runs", "key"), ("runs", "status"), ("datasets", "name"), ("datasets", "key"), ("datasets", "artifact"),
        ("checkpoints", "name"), ("checkpoints", "run"), ("checkpoints", "artifact"),
    ):  # fmt: skip
        connection.exec_driver_sql(f"CREATE INDEX {table}_{column} ON {table} ({column})")


MIGRATIONS: Sequence[Migration] = (_tables, _indexes)
LATEST = len(MIGRATIONS)


def migrate(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Applies what is missing, inside the transaction of `connection`. Raises AlignError for a newer registry."""
    connection.exec_driver_sql(
        "CREATE TABLE IF NOT EXISTS migrations (number INTEGER NOT NULL PRIMARY KEY, applied TEXT NOT NULL)"
    )
    done = connection.exec_driver_sql("SELECT coalesce(max(number), 0) FROM migrations").scalar_one()
    refuse_newer(done)
    for number, migration in enumerate(migrations[done:], start=done + 1):
        migration(connection)
        applied = datetime.now(UTC).isoformat(timespec="seconds")
        connection.exec_driver_sql(f"INSERT INTO migrations (number, applied) VALUES ({number}, '{applied}')")


def refuse_newer(version: int) -> None:
    """Raises AlignError when the registry knows more migrations than this program."""
    if version > LATEST:
        raise AlignError(
            f"the registry has schema {version}; this align knows schemas up to {LATEST}",
            "Upgrade align, or point ALIGN_HOME to another folder.",
        )
