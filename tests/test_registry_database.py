"""No registration is lost among writers, and every database that cannot be used is refused with what to do."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import inspect

from align.errors import AlignError
from align.registry import Registry, identity, schema
from align.registry.database import SqliteDatabase
from align.registry.migrations import LATEST, MIGRATIONS, migrate
from align.registry.mounts import network_filesystem
from tests.registry_fill import add_checkpoint, begin, finish

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], text=True, stdout=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


WRITER = """
import sys
from align.registry import Registry
from tests.registry_fill import add_checkpoint
registry = Registry.open()
for number in range(int(sys.argv[2])):
    add_checkpoint(registry, "harbour/sft", f"{sys.argv[1]} {number}")
"""


@pytest.mark.parametrize(("processes", "each"), [(4, 5), pytest.param(8, 50, marks=pytest.mark.slow)])
def test_processes_that_create_and_fill_one_registry_lose_nothing(align_home: Path, processes: int, each: int) -> None:
    writers = [python(WRITER, str(number), str(each)) for number in range(processes)]
    assert [writer.wait() for writer in writers] == [0] * processes
    total = processes * each
    registry = Registry.open()
    records = registry.all_checkpoints()
    assert len({record.id for record in records}) == len({record.number for record in records}) == total
    assert len(registry.all_runs()) == total
    assert {run.status for run in registry.all_runs()} == {"finished"}
    assert len({record.path for record in records if record.path.is_dir()}) == total
    assert sqlite3.connect(align_home / "registry.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_writer_waits_for_another_and_readers_do_not(align_home: Path) -> None:
    registry = Registry.open()
    add_checkpoint(registry)
    holder = python(
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE');"
        "print('held', flush=True); time.sleep(1); c.execute('COMMIT')",
        str(align_home / "registry.db"),
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    assert len(registry.all_checkpoints()) == 1
    assert time.monotonic() - started < 0.5
    registry.tag("harbour/sft", "best")
    assert time.monotonic() - started > 0.5
    assert holder.wait() == 0


def schema_of(database: SqliteDatabase) -> dict[str, object]:
    with database.write() as connection:
        seen = inspect(connection)
        return {
            table: (
                {c["name"]: (c["type"].python_type, c["nullable"]) for c in seen.get_columns(table)},
                seen.get_pk_constraint(table)["constrained_columns"],
                sorted(i["name"] for i in seen.get_indexes(table)),
                sorted((k["constrained_columns"], k["referred_table"]) for k in seen.get_foreign_keys(table)),
            )
            for table in seen.get_table_names()
        }


def test_the_migrations_arrive_at_the_tables_that_the_code_writes_to(tmp_path: Path) -> None:
    migrated, described = SqliteDatabase(tmp_path / "a.db"), SqliteDatabase(tmp_path / "b.db")
    with migrated.write() as connection:
        migrate(connection)
    with described.write() as connection:
        schema.metadata.create_all(connection)
    assert schema_of(migrated) == schema_of(described)
    assert migrated.version() == LATEST == len(MIGRATIONS)


@pytest.mark.parametrize("old", range(1, LATEST))
def test_an_old_registry_is_brought_up_to_date_and_keeps_its_rows(align_home: Path, old: int) -> None:
    registry = Registry.open()
    record = add_checkpoint(registry)
    rows = {
        table: registry._database.read(f"SELECT * FROM {table}")
        for table in ("artifacts", "runs", "checkpoints", "identity")
    }
    (align_home / "registry.db").unlink()
    database = SqliteDatabase(align_home / "registry.db")
    with database.write() as connection:
        migrate(connection, MIGRATIONS[:old])
        connection.exec_driver_sql("DELETE FROM identity")
        for table, kept in rows.items():
            for row in kept:
                names = ", ".join(f":{name}" for name in row)
                connection.exec_driver_sql(f"INSERT INTO {table} ({names.replace(':', '')}) VALUES ({names})", row)
    assert database.version() == old
    assert Registry.open(create=False).checkpoint("harbour/sft") == record
    assert database.version() == LATEST


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "a.db")
    for _ in range(2):
        with database.write() as connection:
            migrate(connection)
    assert [row["number"] for row in database.read("SELECT number FROM migrations ORDER BY number")] == [1, 2]


def test_a_migration_that_fails_leaves_the_old_version(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "a.db")
    with database.write() as connection:
        migrate(connection, MIGRATIONS[:1])

    def broken(connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half (a TEXT)")
        raise RuntimeError

    with pytest.raises(RuntimeError), database.write() as connection:
        migrate(connection, [MIGRATIONS[0], broken])
    assert database.version() == 1
    assert database.read("SELECT name FROM sqlite_master WHERE name = 'half'") == []


def test_a_registry_of_a_newer_align_is_refused() -> None:
    registry = Registry.open()
    with registry._database.write() as connection:
        connection.exec_driver_sql("INSERT INTO migrations (number, applied) VALUES (99, '2030')")
    with pytest.raises(AlignError, match="schema 99; this align knows schemas up to"):
        Registry.open()


def test_a_damaged_database_is_refused_with_the_artifacts_untouched(align_home: Path) -> None:
    record = add_checkpoint(Registry.open())
    for path in align_home.glob("registry.db-*"):
        path.unlink()
    (align_home / "registry.db").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(AlignError, match=r"registry\.db is damaged"):
        Registry.open()
    assert record.path.is_dir()


def test_looking_at_a_registry_that_does_not_exist_makes_none(align_home: Path) -> None:
    registry = Registry.open(create=False)
    assert (registry.all_checkpoints(), registry.all_runs(), registry.all_data()) == ([], [], [])
    assert not align_home.exists()


def asked(registry: Registry) -> list[object]:
    """What a first run asks before it makes the registry."""
    return [
        registry.recover(), registry.data_by_key("k"), registry.checkpoint_by_key("k"), registry.resumable("k"),
        registry.knows("harbour/sft"), registry.all_checkpoints(), registry.all_runs(), registry.all_data(),
    ]  # fmt: skip


NOTHING = [[], None, None, None, False, [], [], []]


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("mode", ["WAL", None])
def test_a_registry_whose_making_was_killed_has_nothing_and_is_made(
    align_home: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, read_only: bool
) -> None:
    """The file is there, empty or with WAL mode switched on, and none of the tables."""
    align_home.mkdir()
    file = align_home / "registry.db"
    file.touch()
    if mode:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA journal_mode={mode}")
        assert file.stat().st_size == 4096
    if read_only:
        select = SqliteDatabase._select
        monkeypatch.setattr(
            SqliteDatabase, "_select", lambda self, sql, values, _: select(self, sql, values, "mode=ro")
        )
    registry = Registry.open(create=False)
    assert asked(registry) == NOTHING
    registry.make()
    assert add_checkpoint(registry) == registry.checkpoint("harbour/sft")


def test_a_table_that_is_missing_from_a_made_registry_is_not_taken_for_nothing() -> None:
    registry = Registry.open()
    with registry._database.write() as connection:
        connection.exec_driver_sql("DROP TABLE tags")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        registry._database.read("SELECT tag FROM tags")


def lose_database(home: Path) -> None:
    for path in home.glob("registry.db*"):
        path.unlink()


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_a_home_whose_database_is_missing_or_another_s_is_refused(
    align_home: Path, tmp_path: Path, create: bool, other: bool
) -> None:
    """By listings too, and no new database is made there."""
    record = add_checkpoint(Registry.open())
    lose_database(align_home)
    if other:
        Registry.open(tmp_path / "other")
        for file in (tmp_path / "other").glob("registry.db*"):
            shutil.copy(file, align_home)
    found = "the database is registry" if other else "the database is missing or empty"
    with pytest.raises(AlignError, match=f"belongs to registry .*{found}.*; not in it: 1 of the folders") as refusal:
        Registry.open(create=create)
    assert "gc` would remove them" in refusal.value.hint
    assert (align_home / "registry.db").exists() == other
    assert record.path.is_dir()


@pytest.mark.parametrize("create", [True, False])
def test_no_database_begins_where_checkpoints_lie_that_it_would_not_know(align_home: Path, create: bool) -> None:
    """Not even when the mark of the lost one is removed: `gc` would take them for what crashes left."""
    record = add_checkpoint(Registry.open())
    lose_database(align_home)
    (align_home / "registry-id").unlink()
    with pytest.raises(AlignError, match="belongs to no registry, and the database does not know 1 of"):
        Registry.open(create=create).gc()
    assert record.path.is_dir()
    assert not (align_home / "registry.db").exists()


def test_what_another_process_makes_while_a_home_is_opened_is_not_taken_for_lost(
    align_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The home was not there when its mark was looked for, and has a checkpoint without a row a moment later."""
    id_of = identity._id_of

    def late(database: object) -> str:
        monkeypatch.undo()
        add_checkpoint(Registry.open(align_home))
        (align_home / "checkpoints" / "0123456789abcdef").mkdir()
        return id_of(database)

    monkeypatch.setattr(identity, "_id_of", late)
    assert len(Registry.open(align_home, create=False).all_checkpoints()) == 1


def test_a_home_that_lost_its_mark_alone_gets_it_back(align_home: Path) -> None:
    add_checkpoint(Registry.open())
    before = (align_home / "registry-id").read_text()
    (align_home / "registry-id").unlink()
    assert len(Registry.open(create=False).all_checkpoints()) == 1
    assert Registry.open().gc() == []
    assert (align_home / "registry-id").read_text() == before


def test_an_empty_mark_is_written_again_and_hides_no_lost_database(align_home: Path) -> None:
    add_checkpoint(Registry.open())
    mark = align_home / "registry-id"
    before = mark.read_text()
    mark.write_text("")
    (align_home / "checkpoints" / "my-model").mkdir()
    assert len(Registry.open(create=False).all_checkpoints()) == 1
    Registry.open()
    assert mark.read_text() == before
    mark.write_text("")
    lose_database(align_home)
    with pytest.raises(AlignError, match="belongs to no registry"):
        Registry.open()


def a_folder(mark: Path) -> None:
    mark.mkdir()


def a_link_to_itself(mark: Path) -> None:
    mark.symlink_to(mark.name)


def not_utf8(mark: Path) -> None:
    mark.write_bytes(b"\xff\xfe\x1b]0;x")


@pytest.mark.parametrize("spoil", [a_folder, a_link_to_itself, not_utf8])
@pytest.mark.parametrize("create", [True, False])
def test_a_mark_that_cannot_be_read_is_refused_with_what_to_do(align_home: Path, spoil, create: bool) -> None:
    add_checkpoint(Registry.open())
    mark = align_home / "registry-id"
    mark.unlink()
    spoil(mark)
    with pytest.raises(AlignError, match=r"registry-id (cannot be read|is damaged)") as refusal:
        Registry.open(create=create)
    assert refusal.value.message.isprintable()
    assert "Remove it" in refusal.value.hint
    assert refusal.value.exit_code == 2


REFUSED = """
from align.errors import AlignError
from align.registry import Registry
try:
    print(Registry.open(create=False).all_runs())
except AlignError as error:
    print(error.message)
"""


def refused(*before: str) -> str:
    """What is said to a process that opens the registry, begun by way of the command `before`."""
    command = [*before, sys.executable, "-c", REFUSED]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


def test_a_mark_that_is_a_pipe_is_not_waited_for(align_home: Path) -> None:
    Registry.open()
    (align_home / "registry-id").unlink()
    os.mkfifo(align_home / "registry-id")
    assert "registry-id: a pipe or a device" in refused()


@pytest.mark.parametrize("closed", ["registry.db", "registry-id", "."])
def test_what_may_not_be_read_is_said_to_be_so(align_home: Path, closed: str) -> None:
    registry = Registry.open()
    add_checkpoint(registry)
    registry._database._engine.dispose()  # leaves no write-ahead log behind
    before = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    if before and not shutil.which("setpriv"):
        pytest.skip("root may read everything here: giving that up needs util-linux")
    mode = (align_home / closed).stat().st_mode
    (align_home / closed).chmod(0)
    try:
        said = refused(*before)
    finally:
        (align_home / closed).chmod(mode)
    assert str(align_home) in said
    assert "cannot be read" in said


READER = """
import json
from align.errors import AlignError
from align.registry import Registry
registry = Registry.open(create=False)
record = registry.checkpoint("harbour/sft")
registry.check_unchanged(record)
seen = {"names": [r.name for r in registry.all_checkpoints()], "problems": registry.verify("harbour/sft"), "errors": []}
seen["status"] = [run.status for run in registry.all_runs()]
from tests.registry_fill import begin
for work in (lambda: begin(Registry.open()), lambda: registry.tag("harbour/sft", "best"), lambda: registry.gc()):
    try:
        work()
    except AlignError as error:
        seen["errors"].append(error.message)
print(json.dumps(seen))
"""


def read_only(home: Path) -> list[str]:
    """The command that another follows to find `home` on a read-only disk; skips where this cannot be had."""
    mount = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"',
        str(home),
    ]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here: they need root and util-linux")
    return mount


@pytest.mark.parametrize("busy", [False, True])
def test_a_read_only_home_can_be_read_and_refuses_writes(align_home: Path, busy: bool) -> None:
    registry = Registry.open()
    add_checkpoint(registry)
    with begin(registry, "dpo") as running:
        if not busy:
            registry._database._engine.dispose()  # leaves no write-ahead log behind
        output = subprocess.run(
            [*read_only(align_home), sys.executable, "-c", READER], cwd=ROOT, stdout=subprocess.PIPE, check=True
        ).stdout
        finish(running, "harbour/dpo", "d")
    seen = json.loads(output)
    assert seen["names"] == ["harbour/sft"]
    assert seen["problems"] == []
    assert seen["status"] == ["running", "finished"]
    assert len(seen["errors"]) == 3
    assert all("cannot be written" in message for message in seen["errors"])


def test_network_file_systems_are_known_by_their_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/sdb /home/local ext4 rw 0 0\n"
        "//nas/a /mnt/with\\040space cifs rw 0 0\n"
    )
    monkeypatch.setattr("align.registry.mounts.MOUNTS", mounts)
    assert network_filesystem(Path("/home/me/.align")) == "nfs4"
    assert network_filesystem(Path("/home/local/.align")) is None
    assert network_filesystem(Path("/srv/homely")) is None
    assert network_filesystem(Path("/mnt/with space")) == "cifs"


def test_on_a_network_file_system_sqlite_does_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.registry.database.network_filesystem", lambda _folder: "nfs4")
    registry = Registry.open()
    add_checkpoint(registry)
    assert registry._database.read("PRAGMA journal_mode") == [{"journal_mode": "delete"}]


def test_sqlite_is_in_wal_mode() -> None:
    assert Registry.open()._database.read("PRAGMA journal_mode") == [{"journal_mode": "wal"}]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/db", "cannot live in 'mysql'; known: postgresql"),
        ("nonsense", "not a database URL"),
        ("postgresql://user:secret@127.0.0.1:1/db", "does not answer"),
    ],
)
def test_a_registry_url_that_cannot_work_is_refused_without_showing_the_password(url: str, message: str) -> None:
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed")
    with pytest.raises(AlignError, match=message) as error:
        Registry.open(url=url)
    assert "secret" not in str(error.value)


def test_listing_loads_neither_torch_nor_sqlalchemy() -> None:
    add_checkpoint(Registry.open())
    code = (
        "import sys; from align.registry import Registry; r = Registry.open(create=False); r.all_checkpoints(); r.all_runs();"
        "print(sorted({'torch', 'transformers', 'sqlalchemy', 'pydantic'} & set(sys.modules)))"
    )
    assert python(code).communicate()[0] == "[]\n"
