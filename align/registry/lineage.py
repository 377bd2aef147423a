"""Where a checkpoint came from: checkpoints, data sets and models outside the registry, as a graph. Drawing is not here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.registry import queries
from align.registry.records import CheckpointRecord, DataRecord, RunRecord
from align.registry.references import ids_in

if TYPE_CHECKING:
    from align.registry.database import Database


@dataclass(frozen=True, slots=True)
class Edge:
    """`child` was made from `parent`; rows: how many rows of a data set were used, None for a checkpoint."""

    child: str
    parent: str
    rows: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"child": self.child, "parent": self.parent, "rows": self.rows}


@dataclass(frozen=True, slots=True)
class Node:
    """One thing in the graph. kind: a checkpoint's kind, `data`, or `outside` for what the registry does not hold.

    stage: kind of the stage that made it (sft, dpo, ...), '' where nothing of ours did.
    """

    id: str
    name: str
    kind: str
    stage: str = ""
    run: str | None = None
    created: str | None = None
    tags: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "id": self.id, "name": self.name, "kind": self.kind, "stage": self.stage, "run": self.run,
            "created": self.created, "tags": list(self.tags),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lineage:
    """The graph above one checkpoint, and the names of what was made from it."""

    root: str
    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]
    children: tuple[Node, ...]

    def parents(self, node: str) -> list[Edge]:
        """Edges from a node to what it was made from: checkpoints first."""
        return sorted((edge for edge in self.edges if edge.child == node), key=lambda edge: edge.rows is not None)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "checkpoint": self.root,
            "nodes": [node.as_dict() for node in self.nodes.values()],
            "edges": [edge.as_dict() for edge in self.edges],
            "children": [node.as_dict() for node in self.children],
        }


def children_of(database: Database, home: Path, checkpoint: str) -> list[CheckpointRecord]:
    """Checkpoints of other content that name this id as a parent, newest first."""
    condition = "c.parents LIKE :pattern AND c.artifact <> :id"
    return queries.checkpoints(database, home, condition, pattern=f'%"{checkpoint}"%', id=checkpoint)


def trace(database: Database, home: Path, start: CheckpointRecord) -> Lineage:
    """Follows parents and data sets from `start` to where nothing earlier is known."""
    graph = _Graph(database, home)
    graph.add_checkpoint(start)
    children = tuple(
        _checkpoint_node(child, graph.run_kind(child.run)) for child in children_of(database, home, start.id)
    )
    return Lineage(start.id, graph.nodes, tuple(dict.fromkeys(graph.edges)), children)


class _Graph:
    """Nodes and edges found so far; each node is looked up once."""

    def __init__(self, database: Database, home: Path) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: list[Edge] = []
        self._database = database
        self._home = home
        self._waiting: list[Callable[[], None]] = []

    def add_checkpoint(self, record: CheckpointRecord) -> None:
        """Adds a checkpoint and everything above it."""
        self._take_checkpoint(record)
        while self._waiting:
            self._waiting.pop(0)()

    def run_kind(self, run_id: str | None) -> str:
        """Kind of the stage that a run was, '' when unknown."""
        run = self._run(run_id)
        return run.kind if run else ""

    def _take_checkpoint(self, record: CheckpointRecord) -> None:
        run = self._run(record.run)
        names = _input_names(run.inputs) if run else {}
        self.nodes[record.id] = _checkpoint_node(record, run.kind if run else "")
        for parent in record.parents:
            self.edges.append(Edge(record.id, parent))
            self._later(parent, names.get(parent, parent))
        for use in record.data:
            self.edges.append(Edge(record.id, use.id, use.rows))
            self._later(use.id, use.name)

    def _take_data(self, record: DataRecord) -> None:
        run = self._run(record.run)
        self.nodes[record.id] = Node(
            record.id, record.name, "data", run.kind if run else "", record.run, record.created
        )
        for parent in sorted(ids_in(run.inputs_json)) if run else ():
            self.edges.append(Edge(record.id, parent))
            self._later(parent, parent)

    def _later(self, node: str, name: str) -> None:
        if node not in self.nodes:
            self.nodes[node] = Node(node, name, "outside")
            self._waiting.append(lambda: self._resolve(node))

    def _resolve(self, node: str) -> None:
        if found := queries.checkpoints(self._database, self._home, "c.artifact = :id", id=node):
            self._take_checkpoint(found[0])
        elif data := queries.datasets(self._database, self._home, "d.artifact = :id", id=node):
            self._take_data(data[0])

    def _run(self, run_id: str | None) -> RunRecord | None:
        found = queries.runs(self._database, self._home, "r.id = :id", id=run_id) if run_id else []
        return found[0] if found else None


def _input_names(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Names by which a run knew the models that went into it, by id."""
    rewards = {str(identifier): str(name) for name, identifier in inputs.get("rewards", {}).items()}
    start = {str(inputs["parent_id"]): str(inputs["parent"])} if {"parent_id", "parent"} <= inputs.keys() else {}
    return {**rewards, **start}


def _checkpoint_node(record: CheckpointRecord, stage_kind: str) -> Node:
    return Node(record.id, record.name, record.kind, stage_kind, record.run, record.created, record.tags)
