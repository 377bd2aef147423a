"""Faults on demand: the n-th time that the store touches disk or database, the call fails, or the process dies."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from align.registry import Registry

KILLED = 137
DISK = ("fsync", "chmod", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate")  # of os
ROOM = frozenset({"open", "write", "mkdir", "fsync", "commit"})  # what a full disk refuses
MOST = 600  # calls of one operation


class Faults:
    """Lets `countdown` watched calls pass; the next one meets `act`. lasting: and so do all after it, of those in `only`."""

    def __init__(
        self, countdown: int, act: Callable[[str], None], *, only: frozenset[str] = frozenset(), lasting: bool = False
    ) -> None:
        self.countdown, self.act, self.only, self.lasting = countdown, act, only, lasting
        self.fired = False

    def meets(self, name: str) -> bool:
        """Whether this call is the one."""
        if self.only and name not in self.only:
            return False
        self.countdown -= 1
        due = self.countdown == -1 or (self.lasting and self.countdown < 0)
        self.fired |= due
        return due

    def strike(self, name: str) -> None:
        """Acts if this call is the one."""
        if self.meets(name):
            self.act(name)

    @contextmanager
    def armed(self, *, after: bool = False) -> Iterator[None]:
        """Watches the calls in this block. after: each counts twice, before and after it is done, as for a kill."""
        places = [(os, name) for name in DISK]
        places += [(Connection, name) for name in ("commit", "execute", "exec_driver_sql")]
        before = [(owner, name, getattr(owner, name)) for owner, name in places] + [(io, "open", io.open)]
        for owner, name, call in before[:-1]:
            setattr(owner, name, self._watched(name, call, after=after))
        io.open = self._opened  # type: ignore[assignment]
        self._open = before[-1][2]
        try:
            yield
        finally:
            for owner, name, call in before:
                setattr(owner, name, call)

    def _watched(self, name: str, call: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def watched(*values: Any, **named: Any) -> Any:
            self.strike(name)
            result = call(*values, **named)
            if after:
                self.strike(name)
            return result

        return watched

    def _opened(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+"):
            return self._open(file, mode, *rest, **named)
        self.strike("open")
        return _Stream(self._open(file, mode, *rest, **named), self)


class _Stream:
    """A stream whose writes can be torn: half of the text arrives."""

    def __init__(self, stream: Any, faults: Faults) -> None:
        self._stream, self._faults = stream, faults

    def write(self, text: Any) -> Any:
        if self._faults.meets("write"):
            self._stream.write(text[: len(text) // 2])
            self._stream.flush()
            self._faults.act("write")
        return self._stream.write(text)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def full(name: str) -> None:
    """No space is left: on disk, or for the database."""
    _fail(name, errno.ENOSPC, "database or disk is full")


def broken(name: str) -> None:
    """The disk reports an error."""
    _fail(name, errno.EIO, "disk I/O error")


def die(_name: str) -> None:
    """As kill -9 would."""
    os._exit(KILLED)


def _fail(name: str, number: int, words: str) -> None:
    if name in ("commit", "execute", "exec_driver_sql"):
        raise OperationalError("statement", {}, sqlite3.OperationalError(words))
    raise OSError(number, os.strerror(number))


def once(act: Callable[[str], None]) -> Callable[[int], Faults]:
    """The n-th call of any kind."""
    return lambda countdown: Faults(countdown, act)


def for_good(countdown: int) -> Faults:
    """The disk is full from the n-th call on that needs room."""
    return Faults(countdown, full, only=ROOM, lasting=True)


def killed(
    folder: Path, work: Callable[[Registry], object], countdown: int, *, only: frozenset[str] = frozenset()
) -> bool:
    """Whether a child process that did `work` in the registry of `folder` was killed before its end. only: calls to watch."""
    child = os.fork()
    if child == 0:
        try:
            registry = Registry.open(folder)
            with Faults(countdown, die, only=only).armed(after=True):
                work(registry)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED
