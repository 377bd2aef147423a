"""A lineage as a tree for the terminal: the checkpoint on top, below it what it was made from."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from align.cli.listing import moment, plain
from align.registry.lineage import Edge, Lineage, Node


def draw(lineage: Lineage) -> list[Tree | Text]:
    """The tree, and a line with what was made from the checkpoint. What two branches share is drawn once."""
    tree = Tree(_label(lineage.nodes[lineage.root]), guide_style="dim")
    _grow(tree, lineage.root, lineage, {lineage.root})
    if not lineage.children:
        return [tree]
    below = ", ".join(f"{child.name}@{child.id[:8]}" for child in lineage.children)
    return [tree, plain(f"made from it: {below}", "dim")]


def _grow(branch: Tree, node: str, lineage: Lineage, drawn: set[str]) -> None:
    for edge in lineage.parents(node):
        label = _label(lineage.nodes[edge.parent], edge)
        if edge.parent not in drawn:
            drawn.add(edge.parent)
            _grow(branch.add(label), edge.parent, lineage, drawn)
        elif lineage.parents(edge.parent):
            branch.add(label.append("  (above)", "dim"))
        else:
            branch.add(label)


def _label(node: Node, edge: Edge | None = None) -> Text:
    label = Text()
    if edge is not None:
        label.append("data " if edge.rows is not None or node.kind == "data" else "from ", "dim")
    label.append_text(plain(node.name, "cyan" if node.kind == "data" else "bold"))
    if node.id != node.name:
        label.append(f"  {node.id[:8]}", "yellow")
    label.append("  " + ", ".join(_remarks(node, edge)), "dim")
    for tag in node.tags:
        label.append(f"  [{tag}]", "green")
    return label


def _remarks(node: Node, edge: Edge | None) -> list[str]:
    if node.kind == "outside":
        return ["not made here"]
    rows = [f"{edge.rows:,} rows"] if edge and edge.rows is not None else []
    kind = [] if node.kind == "data" else [f"{node.kind} by {node.stage}" if node.stage else node.kind]
    return [*kind, *rows, *([moment(node.created)] if node.created else [])]
