"""The files beside a recipe that decide what a stage makes: judges, constitutions, templates, reward functions.

Each is read once, so that an edit while stages run is for the next run, and no key can name other content than was used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, TypeVar

from align.constitution import Constitution
from align.errors import AlignError, did_you_mean
from align.judge import Judge
from align.registry.hashing import sha256_file
from align.small_files import read_small

Content = TypeVar("Content")


@dataclass(frozen=True)
class RecipeFiles:
    """Files by the path that the recipe writes, relative to `folder`; each with the SHA-256 of its bytes."""

    folder: Path
    _read: dict[tuple[str, str], tuple[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    _functions: dict[str, str | None] = field(default_factory=dict, repr=False, compare=False)

    def judge(self, file: str) -> tuple[str, Judge]:
        """A judge."""
        return self._once("judge", file, Judge.load)

    def constitution(self, file: str) -> tuple[str, Constitution]:
        """A constitution."""
        return self._once("constitution", file, Constitution.load)

    def template(self, file: str) -> tuple[str, str]:
        """Text of a chat template."""
        return self._once("template", file, _text)

    def function(self, name: str) -> str | None:
        """SHA-256 of the file that holds a function, as 'module:function'; None where its module is no file."""
        if name not in self._functions:
            spec = module_spec(name.partition(":")[0])
            file = Path(spec.origin) if spec and spec.origin else None
            self._functions[name] = sha256_file(file) if file and file.is_file() else None
        return self._functions[name]

    def _once(self, what: str, file: str, load: Callable[[Path], Content]) -> tuple[str, Content]:
        if (what, file) not in self._read:
            path = existing_file(self.folder / file)
            try:
                self._read[what, file] = sha256_file(path), load(path)
            except OSError as error:
                raise AlignError(f"{what} {path}: {error.strerror}", "Check its permissions.") from error
        return self._read[what, file]


def module_spec(module: str) -> ModuleSpec | None:
    """Where a module is, from the working folder on, without running it or a package around it; None: there is none."""
    spec: ModuleSpec | None = None
    path: Sequence[str] | None = [str(Path.cwd()), *sys.path]
    parts = module.split(".")
    for number in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: number + 1]), path) if path is not None else None
        path = spec.submodule_search_locations if spec else None
    return spec


def existing_file(path: Path) -> Path:
    """The path, if it is a file. Raises AlignError with the nearest name beside it."""
    if path.is_file():
        return path
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise AlignError(f"there is no file {path}", did_you_mean(path.name, beside) if beside else "")


def _text(file: Path) -> str:
    content = read_small(file)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AlignError(f"{file} is not UTF-8 (byte {error.start})", "Save the template as UTF-8.") from error
