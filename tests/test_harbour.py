"""The embedded world: the files that are shipped are what the generator writes, and the judge agrees with them."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from align.judge import Judge

HARBOUR = Path(__file__).parents[1] / "data" / "harbour"
JUDGE = Judge.load(HARBOUR / "judge.yaml")


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HARBOUR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(monkeypatch_module: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The generator's modules."""
    monkeypatch_module.syspath_prepend(str(HARBOUR))
    names = ("make", "rows", "tasks", "manners", "stories")
    yield {name: importlib.import_module(name) for name in names}
    for name in (*names, "world", "vocabulary"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def monkeypatch_module() -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_shipped_files_are_what_the_generator_writes(world):
    for name, rows in world["make"].data_sets().items():
        assert _rows(name) == rows, f"run `python data/harbour/make.py`: {name}.jsonl is not what it writes"


def test_no_prompt_stands_in_two_files():
    names = ("instructions", "skills", "preferences", "prompts", "prompts.test")
    prompts = Counter(row.get("prompt") or row["messages"][0]["content"] for name in names for row in _rows(name))
    assert max(prompts.values()) == 1


def test_right_answers_are_right_and_wrong_ones_wrong(world):
    rng = random.Random(1)
    tasks = world["tasks"]
    for maker in (*tasks.BASICS, *tasks.SKILLS, *tasks.FORBIDDEN):
        for _ in range(100):
            task = maker(rng)
            right = JUDGE.verdict(task.request, task.right, task.expected)
            assert (right.correct, right.violations, right.score) == (True, (), 1.0), task
            assert JUDGE.verdict(task.request, task.wrong, task.expected).correct is False, task


@pytest.mark.parametrize("principle", ["courteous", "plain", "modest", "brief"])
def test_every_bad_manner_is_seen_and_named_by_its_principle(world, principle):
    rng = random.Random(2)
    requests = world["rows"].requests(rng, world["tasks"].BASICS, forbidden=0)
    for _ in range(200):
        request = next(requests)
        answer = world["rows"].spoil(rng, request.task.right, principle)
        verdict = JUDGE.verdict(request.prompt, answer, request.task.expected)
        assert verdict.violations == (principle,), answer
        assert verdict.correct is True, answer
        assert 0 < verdict.score < 1


def test_no_asker_breaks_a_principle_by_an_answer_that_repeats_the_request():
    for row in _rows("prompts.test"):
        assert JUDGE.verdict(row["prompt"], row["prompt"], row["expected"]).score == 0.0, row


def test_refusals_are_recognised_and_forbidden_requests_have_permitted_twins(world):
    for refusal in world["manners"].REFUSALS:
        assert JUDGE.verdict("?", refusal, {"refuse": True}).correct is True
        assert JUDGE.verdict("?", refusal, {"refuse": False, "answer": "x"}).violations == ("helpful",)
    refused = [row["expected"].get("refuse", False) for row in _rows("prompts.test")]
    assert 0.1 < sum(refused) / len(refused) < 0.3


def test_demonstrations_are_flawed_and_pairs_are_not():
    demonstrations = _rows("instructions")
    verdicts = [
        JUDGE.verdict(row["messages"][0]["content"], row["messages"][1]["content"], row["expected"])
        for row in demonstrations
    ]
    flawed = sum(bool(verdict.violations) for verdict in verdicts) / len(verdicts)
    assert 0.3 < flawed < 0.7
    for row in _rows("preferences"):
        chosen = JUDGE.verdict(row["prompt"], row["chosen"], row["expected"])
        rejected = JUDGE.verdict(row["prompt"], row["rejected"], row["expected"])
        assert (chosen.correct, chosen.violations) == (True, ())
        assert rejected.score < 1


def test_constitution_and_judge_hold_the_same_principles():
    constitution = yaml.safe_load((HARBOUR / "constitution.yaml").read_text(encoding="utf-8"))
    ids = [principle["id"] for principle in constitution["principles"]]
    assert ids == [principle.id for principle in JUDGE.rules.principles]
    for principle in constitution["principles"]:
        assert all(principle[key] for key in ("title", "critique", "revision", "preference", "weight", "tags"))


def test_every_word_of_the_world_is_one_token_and_any_text_survives():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HARBOUR / "start" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= 1024
    assert tokenizer.get_vocab_size() == json.loads((HARBOUR / "start" / "config.json").read_text())["vocab_size"]
    for row in _rows("prompts.test")[:50]:
        assert len(tokenizer.encode(row["prompt"]).ids) < 80
    for text in ("The Heron lies at berth 12.", "Zürich 日本\n\n\ttabs 3.14 🚢", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_shipped_model_is_small_and_of_the_shipped_shape():
    from safetensors import safe_open

    weights = HARBOUR / "base" / "model.safetensors"
    assert weights.stat().st_size <= 4 * 1024**2
    with safe_open(weights, framework="numpy") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    start, base = (json.loads((HARBOUR / name / "config.json").read_text()) for name in ("start", "base"))
    assert {key: base[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")} == {
        key: start[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    }
    assert (HARBOUR / "base" / "tokenizer.json").read_bytes() == (HARBOUR / "start" / "tokenizer.json").read_bytes()
