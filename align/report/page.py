"""The chain as one self-contained page: no request leaves it, nothing in it runs but our own small script.

Every text from data passes `words.printable` and Jinja's escaping; a content security policy with the hashes of our own
style and script stands behind both. Reads nothing but the registry.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

import align
from align.report import lineage, words
from align.report.chain import Chain, gather
from align.report.rounds_view import LoopView, loop_view
from align.report.stage_facts import StageFacts
from align.report.stage_view import StageView, stage_view

if TYPE_CHECKING:
    from align.registry.store import Registry


_VERDICTS = {
    "better": "Improved on held-out rows",
    "worse": "Got worse on held-out rows",
    "unclear": "Not to be told from before",
    "same": "Unchanged",
}


@dataclass(frozen=True)
class Asset:
    """Text of a file that goes into the page, and the hash by which the page's policy lets it through."""

    text: Markup
    hash: str


def write_report(registry: Registry, target: str, out: Path) -> None:
    """Write the page of a recipe, run or checkpoint, with everything before it, to `out`.

    Raises AlignError when the registry does not know the target.
    """
    page = render(gather(registry, target))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)


def render(chain: Chain) -> str:
    """The page as text."""
    views = [stage_view(stage, chain) for stage in chain.stages]
    loops = [loop_view(loop) for loop in chain.loops]
    environment = ImmutableSandboxedEnvironment(
        loader=PackageLoader("align.report", "."), autoescape=True, undefined=StrictUndefined,
        finalize=_finalize, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.jinja").render(
        title=chain.title,
        lead=_lead(chain, views, loops),
        stages=views,
        loops={loop.first: loop for loop in loops},
        graphs=_graphs(chain),
        scored=bool(_scores(chain)),
        made=any(stage.made for stage in chain.stages),
        style=_asset("page.css"),
        script=_asset("page.js"),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=align.__version__,
    )


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else words.printable(value)


def _asset(name: str) -> Asset:
    text = resources.files("align.report").joinpath(name).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Asset(Markup(text), f"sha256-{digest}")  # our own file, not data


def _lead(chain: Chain, views: Sequence[StageView], loops: Sequence[LoopView]) -> str:
    start = f" from {_listed(list(chain.outside.values()))}" if chain.outside else ""
    made = sum(stage.done for stage in chain.stages)
    said = [f"{made} stage{'s' * (made != 1)}{start}."]
    trained = [view for view in views if not view.critique]  # a critique stage moves no model
    for verdict, words_before in _VERDICTS.items():
        names = [v.name.rpartition("/")[2] for v in trained if v.headline and v.headline.verdict == verdict]
        said += [f"{words_before}: {_listed(names)}."] if names else []
    said += [f"Loop {loop.name.rpartition('/')[2]}: {loop.sentence}" for loop in loops]
    warned = [v.name.rpartition("/")[2] for v in views if v.ppo and v.ppo.guards]
    said += [f"Guards were raised in {_listed(warned)}."] if warned else []
    for what, makes_data in (("a checkpoint", False), ("data", True)):
        lost = [s.short_name for s in chain.stages if not s.done and (s.kind == "critique") == makes_data]
        said += [f"Without {what}: {_listed(lost)}."] if lost else []
    return " ".join(said)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _graphs(chain: Chain) -> list[Markup]:
    nodes, edges = _nodes(chain), _edges(chain)
    if not nodes:
        return []
    placed = lineage.layout(nodes, edges)
    names = {node.key: node.title for node in nodes}
    said = "; ".join(f"{names[b]} from {names[a]}" for a, b in edges if a in names and b in names)
    title = f"Lineage. {said}"
    scores = _scores(chain)
    return [lineage.draw(nodes, placed, frame, title, scores) for frame in (lineage.ACROSS, lineage.DOWN)]


def _nodes(chain: Chain) -> list[lineage.Node]:
    outside = [
        lineage.Node(key, "model", name.rstrip("/").rpartition("/")[2], "given model")
        for key, name in chain.outside.items()
    ]
    stages = [lineage.Node(s.key, _node_kind(s), s.short_name, _under(s, chain), s.key) for s in chain.stages]
    used = {
        use.id: use for stage in chain.stages for use in stage.uses if use.id not in chain.makers.get(stage.key, ())
    }
    data = [lineage.Node(f"data {key}", "data", use.name, f"{use.rows:,} rows") for key, use in used.items()]
    return [*outside, *stages, *data]


def _node_kind(stage: StageFacts) -> lineage.NodeKind:
    return "stage" if stage.checkpoint else "maker" if stage.made else "unfinished"


def _under(stage: StageFacts, chain: Chain) -> str:
    if stage.checkpoint:
        kept = any(loop.kept and loop.rounds[loop.kept] is stage for loop in chain.loops)
        return f"{stage.kind} · {stage.checkpoint.id[:8]}{' · kept' * kept}"
    if stage.made:
        rows = sum(record.info.get("train_rows", 0) for record in stage.made.outputs.values())
        return f"{stage.kind} · {rows:,} rows"
    return f"{stage.kind} · {stage.run.status if stage.run else 'unfinished'}"


def _edges(chain: Chain) -> list[tuple[str, str]]:
    weights = [(parent, stage.key) for stage in chain.stages for parent in chain.parents.get(stage.key, ())]
    return weights + [edge for stage in chain.stages for edge in _data_edges(stage, chain.makers.get(stage.key, {}))]


def _data_edges(stage: StageFacts, makers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What a stage read leads to it; parts of that which other stages made lead to the mixture that they are in."""
    for place, use in enumerate(stage.uses):
        mixed = place > 0 and use.id in makers and stage.uses[0].id not in makers
        yield makers.get(use.id, f"data {use.id}"), f"data {stage.uses[0].id}" if mixed else stage.key


def _scores(chain: Chain) -> set[tuple[str, str]]:
    """Edges that hand on no weights: from a reward model or a critic to the stage whose answers it scores.

    The first parent of such a stage is its start.
    """
    return {
        (parent, stage.key)
        for stage in chain.stages
        if stage.kind in ("ppo", "critique")
        for parent in chain.parents.get(stage.key, ())[1:]
    }
