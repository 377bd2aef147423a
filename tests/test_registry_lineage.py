"""Lineage follows parents and data sets to where nothing earlier is known."""

from __future__ import annotations

import pytest

from align.registry import CheckpointRecord, DataUse, NewData, Registry
from align.registry.lineage import Edge
from tests.registry_fill import add_checkpoint, add_data, begin, finish

BASE = "cd" * 32


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


def chain(registry: Registry) -> tuple[CheckpointRecord, CheckpointRecord]:
    """sft on an outside model and a data set, then dpo on it and on data that a run over sft made."""
    data = add_data(registry)
    with begin(registry, "sft", inputs={"parent": "org/base", "parent_id": BASE}) as run:
        sft = finish(run, "harbour/sft", "sft", [BASE], [DataUse("instructions", data.id, 1)])
    with begin(registry, "revised", inputs={"parent_id": sft.id}) as run:
        (run.artifact / "made").mkdir()
        (run.artifact / "made" / "train.jsonl").write_text("{}\n")
        (made,) = run.finish_data([NewData("harbour/revised", "key", run.artifact / "made", {})])
    with begin(registry, "dpo") as run:
        dpo = finish(run, "harbour/dpo", "dpo", [sft.id], [DataUse("revised", made.id, 7)])
    return sft, dpo


def test_the_graph_reaches_the_outside_model_and_every_data_set(registry: Registry) -> None:
    sft, dpo = chain(registry)
    lineage = registry.lineage("harbour/dpo")
    assert {(node.name, node.kind) for node in lineage.nodes.values()} == {
        ("harbour/dpo", "model"), ("harbour/sft", "model"), ("org/base", "outside"),
        ("harbour/instructions", "data"), ("harbour/revised", "data"),
    }  # fmt: skip
    revised = next(node for node in lineage.nodes.values() if node.name == "harbour/revised")
    assert Edge(dpo.id, sft.id) in lineage.edges
    assert Edge(dpo.id, revised.id, 7) in lineage.edges
    assert Edge(revised.id, sft.id) in lineage.edges, "data that a run made leads on to that run's parent"
    assert Edge(sft.id, BASE) in lineage.edges
    assert len(lineage.edges) == 5


def test_json_is_a_graph_of_ids(registry: Registry) -> None:
    _, dpo = chain(registry)
    document = registry.lineage("harbour/dpo").as_dict()
    ids = {node["id"] for node in document["nodes"]}
    assert document["checkpoint"] == dpo.id
    assert all({edge["child"], edge["parent"]} <= ids for edge in document["edges"])
    below = registry.lineage("harbour/sft").as_dict()
    assert [child["id"] for child in below["children"]] == [dpo.id]
    assert dpo.id not in {node["id"] for node in below["nodes"]}


def test_a_checkpoint_equal_to_its_parent_does_not_go_round_in_circles(registry: Registry) -> None:
    first = add_checkpoint(registry, "harbour/sft", "same")
    add_checkpoint(registry, "harbour/idle", "same", parents=[first.id])
    lineage = registry.lineage("harbour/idle")
    assert len(lineage.nodes) == 1
    assert lineage.children == ()
    assert registry.gc(dry_run=True) == []


def test_a_long_chain_is_followed_to_its_end(registry: Registry) -> None:
    parent = add_checkpoint(registry, "long/s0")
    for number in range(1, 30):
        parent = add_checkpoint(registry, f"long/s{number}", parents=[parent.id])
    assert len(registry.lineage("long/s29").nodes) == 30
