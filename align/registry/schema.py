"""The tables as they are now, for statements that write. How a registry gets there is in migrations.py; a test holds
the two together.

JSON is kept as text and times as ISO 8601 text in UTC, so that every database sorts and compares them alike. `number`
counts registrations: the newest row is the one with the highest, whatever the clocks said.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, Table, Text

metadata = MetaData()

migrations = Table(
    "migrations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("applied", Text, nullable=False),
)

identity = Table("identity", metadata, Column("id", Text, primary_key=True))

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("path", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("files", Text, nullable=False),
    Column("created", Text, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False, unique=True),
    Column("recipe", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("settings", Text, nullable=False),
    Column("inputs", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("started", Text, nullable=False),
    Column("ended", Text),
)

datasets = Table(
    "datasets",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("artifact", Text, ForeignKey("artifacts.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("info", Text, nullable=False),
    Column("run", Text, ForeignKey("runs.id")),
    Column("created", Text, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("artifact", Text, ForeignKey("artifacts.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("run", Text, ForeignKey("runs.id"), nullable=False),
    Column("parents", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("template_sha256", Text),
    Column("tokenizer_sha256", Text),
    Column("metrics", Text, nullable=False),
    Column("samples", Text, nullable=False),
    Column("versions", Text, nullable=False),
    Column("created", Text, nullable=False),
)

metrics = Table(
    "metrics",
    metadata,
    Column("run", Text, ForeignKey("runs.id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, primary_key=True),
    Column("value", Double),
)

tags = Table(
    "tags",
    metadata,
    Column("tag", Text, primary_key=True),
    Column("checkpoint", Integer, ForeignKey("checkpoints.number"), nullable=False),
)

Index("runs_key", runs.c.key)
Index("runs_status", runs.c.status)
Index("datasets_name", datasets.c.name)
Index("datasets_key", datasets.c.key)
Index("datasets_artifact", datasets.c.artifact)
Index("checkpoints_name", checkpoints.c.name)
Index("checkpoints_run", checkpoints.c.run)
Index("checkpoints_artifact", checkpoints.c.artifact)
