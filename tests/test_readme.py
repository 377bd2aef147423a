"""The README says what there is: every command and make target stands there, and those that stand there exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.cli.commands import COMMANDS, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_has_help_and_stands_in_the_readme(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert f"align {name}" in README


def test_the_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"\balign ([a-z]+)\b", README))
    assert named - set(cli.commands) <= {"its"}, "words behind `align` that are no command"


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) == {"demo", "test"} <= targets
    assert "merge-adapter" in targets


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = re.search(r"```\nalign/\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    named = re.findall(r"^  ([a-z_]+(?:/|\.py))", tree[1], re.MULTILINE)
    assert named
    assert [name for name in named if not (ROOT / "align" / name).exists()] == []
    packages = {f"{path.parent.name}/" for path in (ROOT / "align").glob("*/__init__.py")}
    assert packages <= set(named)
