"""A PostgreSQL server for the tests: the one of ALIGN_TEST_POSTGRES_URL, or one started from the server's own programs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ACCOUNT = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root


def program(name: str) -> str | None:
    """Path of a program of the server, also where Debian keeps it."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


@contextmanager
def postgres_server() -> Iterator[str]:
    """URL of a server; skips where there is none."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'align[postgres]'")
    if given := os.environ.get("ALIGN_TEST_POSTGRES_URL"):
        yield given
        return
    initdb, postgres = program("initdb"), program("pg_ctl")
    if not initdb or not postgres:
        pytest.skip("no PostgreSQL server here and no ALIGN_TEST_POSTGRES_URL")
    folder = Path("/tmp") / f"align-postgres-{os.getpid()}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -k /tmp -c listen_addresses=127.0.0.1 -c fsync=off"
    quiet = {"user": ACCOUNT, "cwd": "/tmp", "check": True, "stdout": subprocess.DEVNULL}
    try:
        subprocess.run([initdb, "-D", str(folder), "-U", "align", "-A", "trust", "-E", "UTF8"], **quiet)
        subprocess.run([postgres, "-D", str(folder), "-w", "-o", options, "-l", str(folder / "log"), "start"], **quiet)
        yield f"postgresql://align@127.0.0.1:{port}/postgres"
        subprocess.run([postgres, "-D", str(folder), "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def emptied(url: str) -> str:
    """The database without any table."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url
