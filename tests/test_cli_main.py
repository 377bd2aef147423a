"""How a command begins: a Ctrl-C that comes early, and a current folder that is no longer there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = "from align.cli.main import main; main()"
STOPPED_WHILE_LOADING = f"""
import os, signal, sys
class Broken:
    @staticmethod
    def find_spec(name, *_):
        if name == sys.argv[-1]:
            sys.meta_path.remove(Broken)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Broken)
{MAIN}
"""


@pytest.mark.parametrize("library", ["click", "align.cli.runs", "align.registry"])
def test_ctrl_c_while_the_commands_are_loaded_ends_as_ctrl_c(library: str) -> None:
    begun = [sys.executable, "-c", STOPPED_WHILE_LOADING, "runs", "show", library]
    done = subprocess.run(begun, capture_output=True, check=False, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip() in (b"", b"stopped")


def in_a_lost_folder(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    gone = tmp_path / "gone"
    gone.mkdir()
    return subprocess.run(
        ["sh", "-c", 'rmdir ../gone && exec "$@"', "sh", sys.executable, "-c", MAIN, *arguments],
        cwd=gone, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "home"),
    [(["runs", "list"], ""), (["runs", "list"], "a/relative/one"), (["run", "/nowhere/recipe.yaml"], "/nowhere/home")],
)
def test_a_current_folder_that_is_gone_is_said(arguments: list[str], home: str, tmp_path: Path) -> None:
    done = in_a_lost_folder(tmp_path, *arguments, ALIGN_HOME=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "error: the current folder has been deleted"


def test_what_needs_no_current_folder_works_without_one(tmp_path: Path) -> None:
    done = in_a_lost_folder(tmp_path, "runs", "list", "--json")
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
