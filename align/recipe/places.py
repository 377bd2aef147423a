"""What is wrong in a YAML file, each point with its file and line. Knows nothing of what the file is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from align.errors import AlignError
from align.recipe.yaml_text import Node, Place

MOST_LISTED = 20

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend. `path` leads to it from the top of the recipe."""

    path: Path
    message: str
    hint: str = ""
    at_key: bool = False  # points at the key instead of at the value


def refusal(problems: Sequence[Problem], root: Node) -> AlignError:
    """One error for all problems, in the order of the file: the first is the message, the others are listed."""
    placed = sorted(((_place(problem, root), problem) for problem in problems), key=lambda pair: pair[0])
    lines = [f"{place}: {problem.message}" for place, problem in placed]
    if len(lines) == 1:
        return AlignError(lines[0], problems[0].hint)
    listed = lines[1:MOST_LISTED]
    more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return AlignError(lines[0], "\n  ".join([*listed, *more, f"{len(lines)} problems in all."]))


def node_at(root: Node, path: Iterable[str | int]) -> tuple[Node, Path]:
    """The deepest node on the way along `path`, and the part of the path that led there.

    Steps that lead nowhere are left out: a missing key, or the tag that pydantic names for a union's member.
    """
    node, walked = root, []
    for step in path:
        child = child_at(node, step)
        if child is not None:
            node = child
            walked.append(step)
    return node, tuple(walked)


def child_at(node: Node, step: str | int) -> Node | None:
    """The value under a key or at a place of a list; None: there is none."""
    if isinstance(node.value, dict) and isinstance(step, str):
        return node.value.get(step)
    if isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
        return node.value[step]
    return None


def _place(problem: Problem, root: Node) -> Place:
    node, _ = node_at(root, problem.path)
    return node.key_place if problem.at_key else node.place
