"""The lineage graph: what was made from what, laid out in ranks and drawn twice, across for a desk and down for a phone.

Layout after Sugiyama (1981): longest-path ranks, place holders where an edge crosses a rank, order by the mean place of
the neighbours. Drawing knows nothing of checkpoints; `chain.py` makes the nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from align.report import svg, words

NodeKind = Literal["model", "data", "stage", "maker", "unfinished"]
SWEEPS = 8
READABLE, SCROLLED = 0.7, 0.8  # a graph that would have to be made smaller than this is shown at that size and scrolled
TITLE = 16  # characters of a name that a box has room for
NODE_WIDTH, NODE_HEIGHT, MARGIN = 148.0, 58.0, 8.0


@dataclass(frozen=True)
class Node:
    """A stage, a data set or a model from outside: a name, a line under it, and the page's anchor when it has one."""

    key: str
    kind: NodeKind
    title: str
    subtitle: str = ""
    anchor: str | None = None


@dataclass(frozen=True)
class Layout:
    """Places: rank from the roots, and the place across the rank in slots (halves are possible), for nodes and holders."""

    rank: dict[str, int]
    across: dict[str, float]
    routes: dict[tuple[str, str], tuple[str, ...]]


@dataclass(frozen=True)
class _Frame:
    """How slots become points on the page."""

    down: bool
    rank_gap: float
    slot_gap: float
    page: float  # width that the page has for it

    def centre(self, rank: float, slot: float) -> svg.Point:
        along, side = rank * self.rank_gap, slot * self.slot_gap
        if self.down:
            return MARGIN + NODE_WIDTH / 2 + side, MARGIN + NODE_HEIGHT / 2 + along
        return MARGIN + NODE_WIDTH / 2 + along, MARGIN + NODE_HEIGHT / 2 + side


ACROSS = _Frame(down=False, rank_gap=NODE_WIDTH + 54, slot_gap=NODE_HEIGHT + 18, page=1056)
DOWN = _Frame(down=True, rank_gap=NODE_HEIGHT + 40, slot_gap=NODE_WIDTH + 12, page=354)


def layout(nodes: Sequence[Node], edges: Iterable[tuple[str, str]]) -> Layout:
    """Ranks and places for a graph without cycles; edges to unknown nodes are left out."""
    known = {node.key for node in nodes}
    kept = [(a, b) for a, b in dict.fromkeys(edges) if a in known and b in known and a != b]
    rank = _ranks([node.key for node in nodes], kept)
    routes = {edge: _route(edge, rank) for edge in kept}
    steps = [pair for route in routes.values() for pair in itertools.pairwise(route)]
    return Layout(rank, _places(_columns(rank), steps), routes)


def draw(
    nodes: Sequence[Node], placed: Layout, frame: _Frame, title: str, dashed: Collection[tuple[str, str]] = ()
) -> Markup:
    """The graph as one drawing; a node with an anchor links to its stage. dashed: edges that hand on no weights."""
    centres = {key: frame.centre(placed.rank[key], placed.across[key]) for key in placed.rank}
    wide = max(x for x, _ in centres.values()) + NODE_WIDTH / 2 + MARGIN
    high = max(y for _, y in centres.values()) + NODE_HEIGHT / 2 + MARGIN
    arrows = [
        _arrow([centres[key] for key in route], frame, "edge dashed" if edge in dashed else "edge")
        for edge, route in placed.routes.items()
    ]
    boxes = [_box(node, *centres[node.key]) for node in nodes]
    style, broad = "lineage " + ("tall" if frame.down else "wide"), wide * READABLE > frame.page
    size = SCROLLED if broad else 1.0
    return svg.drawing(wide, high, title, *arrows, *boxes, class_=style + " broad" * broad, size=size)


def _ranks(keys: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    rank = dict.fromkeys(keys, 0)
    for _ in keys:
        for a, b in edges:
            rank[b] = max(rank[b], min(rank[a] + 1, len(keys)))
    children: dict[str, list[str]] = {}
    for a, b in edges:
        children.setdefault(a, []).append(b)
    fed = {b for _, b in edges}
    for key in keys:  # a source stands right before what it feeds, not at the far end
        if key not in fed and key in children:
            rank[key] = max(0, min(rank[child] for child in children[key]) - 1)
    return rank


def _route(edge: tuple[str, str], rank: dict[str, int]) -> tuple[str, ...]:
    start, end = edge
    holders = []
    for between in range(rank[start] + 1, rank[end]):
        holders.append(f"{start}\0{end}\0{between}")
        rank[holders[-1]] = between
    return (start, *holders, end)


def _columns(rank: Mapping[str, int]) -> list[list[str]]:
    columns: list[list[str]] = [[] for _ in range(max(rank.values(), default=0) + 1)]
    for key, place in rank.items():
        columns[place].append(key)
    return columns


def _places(columns: list[list[str]], steps: Sequence[tuple[str, str]]) -> dict[str, float]:
    near: dict[str, list[str]] = {}
    for a, b in steps:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    across = {key: float(slot) for column in columns for slot, key in enumerate(column)}
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wish = {k: sum(across[n] for n in near.get(k, [k])) / len(near.get(k, [k])) for k in column}
            column.sort(key=lambda key: wish[key])
            across.update({key: float(slot) for slot, key in enumerate(column)})
    return across


def _arrow(points: Sequence[svg.Point], frame: _Frame, style: str) -> Markup:
    half = (NODE_HEIGHT if frame.down else NODE_WIDTH) / 2
    start, end = points[0], points[-1]
    start = (start[0], start[1] + half) if frame.down else (start[0] + half, start[1])
    end = (end[0], end[1] - half - 2) if frame.down else (end[0] - half - 2, end[1])
    stops = [start]
    for x, y in points[1:-1]:  # through the middle of a rank it passes, straight along it
        stops += [(x, y - half), (x, y + half)] if frame.down else [(x - half, y), (x + half, y)]
    stops.append(end)
    pieces = [f"M{stops[0][0]:.0f},{stops[0][1]:.0f}"]
    pieces += [_bend(a, b, frame) for a, b in itertools.pairwise(stops)]
    return svg.element("g", svg.element("path", d="".join(pieces), class_=style), _head(end, frame))


def _bend(a: svg.Point, b: svg.Point, frame: _Frame) -> str:
    if frame.down:
        middle = (a[1] + b[1]) / 2
        return f"C{a[0]:.0f},{middle:.0f} {b[0]:.0f},{middle:.0f} {b[0]:.0f},{b[1]:.0f}"
    middle = (a[0] + b[0]) / 2
    return f"C{middle:.0f},{a[1]:.0f} {middle:.0f},{b[1]:.0f} {b[0]:.0f},{b[1]:.0f}"


def _head(tip: svg.Point, frame: _Frame) -> Markup:
    x, y = tip
    corners = (
        [(x, y + 2), (x - 4.5, y - 6), (x + 4.5, y - 6)]
        if frame.down
        else [(x + 2, y), (x - 6, y - 4.5), (x - 6, y + 4.5)]
    )
    return svg.element("path", d=svg.path(corners) + "Z", class_="head")


def _box(node: Node, x: float, y: float) -> Markup:
    left, top = x - NODE_WIDTH / 2, y - NODE_HEIGHT / 2
    parts = [
        svg.element("title", words.one_line(f"{node.title} {node.subtitle}", 200)),
        svg.element(
            "rect",
            x=left,
            y=top,
            width=NODE_WIDTH,
            height=NODE_HEIGHT,
            rx=NODE_HEIGHT / 2 if node.kind == "data" else 8,
        ),
        svg.text(x, y - 2, _shortened(node.title), anchor="middle", class_="name"),
        svg.text(x, y + 16, words.one_line(node.subtitle, 22), anchor="middle", class_="quiet"),
    ]
    box = svg.element("g", *parts, class_=f"node {node.kind}")
    return svg.element("a", box, href=f"#{node.anchor}") if node.anchor else box


def _shortened(title: str) -> str:
    """As much of a name as a box has room for: its beginning and its end, where rounds of a loop differ."""
    name = words.one_line(title, 200)
    return name if len(name) <= TITLE else f"{name[:5]}…{name[6 - TITLE :]}"
