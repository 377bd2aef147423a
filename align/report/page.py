"""The chain as one self-contained page: no request leaves it, nothing in it runs but our own small script.

Every text from data passes `words.printable` and Jinja's escaping; a content security policy with the hashes of our own
style and script stands behind both. Reads nothing but the registry.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
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
from align.report.chain import Chain, StageFacts, gather
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
    environment = ImmutableSandboxedEnvironment(
        loader=PackageLoader("align.report", "."), autoescape=True, undefined=StrictUndefined,
        finalize=_finalize, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.jinja").render(
        title=chain.title,
        lead=_lead(chain, views),
        stages=views,
        graphs=_graphs(chain),
        scored=bool(_scores(chain)),
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


def _lead(chain: Chain, views: Sequence[StageView]) -> str:
    start = f" from {_listed(list(chain.outside.values()))}" if chain.outside else ""
    made = sum(stage.checkpoint is not None for stage in chain.stages)
    said = [f"{made} stage{'s' * (made != 1)}{start}."]
    for verdict, words_before in _VERDICTS.items():
        names = [v.name.rpartition("/")[2] for v in views if v.headline and v.headline.verdict == verdict]
        said += [f"{words_before}: {_listed(names)}."] if names else []
    warned = [v.name.rpartition("/")[2] for v in views if v.ppo and v.ppo.guards]
    said += [f"Guards were raised in {_listed(warned)}."] if warned else []
    lost = [v.name.rpartition("/")[2] for v in views if v.problem]
    return " ".join(said + ([f"Without a checkpoint: {_listed(lost)}."] if lost else []))


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
    stages = [
        lineage.Node(s.key, "stage" if s.checkpoint else "unfinished", s.name.rpartition("/")[2], _under(s), s.key)
        for s in chain.stages
    ]
    used = {use.id: use for stage in chain.stages if stage.checkpoint for use in stage.checkpoint.data}
    data = [lineage.Node(f"data {key}", "data", use.name, f"{use.rows:,} rows") for key, use in used.items()]
    return [*outside, *stages, *data]


def _under(stage: StageFacts) -> str:
    if stage.checkpoint:
        return f"{stage.kind} · {stage.checkpoint.id[:8]}"
    return f"{stage.kind} · {stage.run.status if stage.run else 'unfinished'}"


def _edges(chain: Chain) -> list[tuple[str, str]]:
    weights = [(parent, stage.key) for stage in chain.stages for parent in chain.parents.get(stage.key, ())]
    data = [(f"data {use.id}", s.key) for s in chain.stages if s.checkpoint for use in s.checkpoint.data]
    return weights + data


def _scores(chain: Chain) -> set[tuple[str, str]]:
    """Edges from a reward model to the policy whose answers it scores; the first parent of a ppo stage is its start."""
    return {
        (parent, stage.key)
        for stage in chain.stages
        if stage.kind == "ppo"
        for parent in chain.parents.get(stage.key, ())[1:]
    }
