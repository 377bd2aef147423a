"""A critic held against pairs that people have judged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from align.cli.commands import cli
from align.critique.agreement import agreement
from align.critique.critics import Case, Contest
from align.critique.writing import Written
from align.data.examples import Message, Preference
from align.errors import AlignError
from tests.critique_kit import constitution, port_in, said


@dataclass
class Chooser:
    """Chooses as it is told; a text of `too_long` fits no context."""

    sure: float = 0.8
    first_bonus: float = 0.0  # added to the probability of what stands first

    def critiques(self, cases: Sequence[Case]) -> list[Written | None]:
        raise AssertionError("nothing is criticised here")

    revisions = critiques

    def choices(self, contests: Sequence[Contest]) -> list[float | None]:
        return [self._choice(contest) for contest in contests]

    def _choice(self, contest: Contest) -> float | None:
        if "too_long" in (contest.first, contest.second):
            return None
        better = contest.first.startswith("good")
        return min(1.0, (self.sure if better else 1 - self.sure) + self.first_bonus)


def pair(chosen: str, rejected: str) -> Preference:
    return Preference(said("hello"), (Message("assistant", chosen),), (Message("assistant", rejected),))


RIGHT, WRONG = pair("good one", "bad one"), pair("bad two", "good two")


def test_a_critic_that_agrees_is_right_and_its_loss_is_worked_by_hand() -> None:
    found = agreement(Chooser(0.8), constitution(), [RIGHT, RIGHT, RIGHT, WRONG], panel=2, seed=0)
    assert found["accuracy"]["value"] == 0.75
    assert found["first"]["value"] == 0.5
    assert found["consistent"]["value"] == 1.0
    assert found["loss"]["value"] == pytest.approx((3 * -math.log(0.8) - math.log(0.2)) / 4)
    assert found["calibration"] == [{"confidence": pytest.approx(0.8), "accuracy": 0.75, "n": 4}]
    assert found["too_long"] == 0


def test_a_critic_that_always_takes_the_first_agrees_with_nobody_and_is_seen_through() -> None:
    found = agreement(Chooser(0.5, first_bonus=0.4), constitution(), [RIGHT, WRONG], panel=3, seed=0)
    assert found["first"]["value"] == 1.0
    assert found["consistent"]["value"] == 0.0
    assert found["accuracy"]["value"] == 0.5  # both orders cancel: a tie counts half


def test_each_principle_has_an_accuracy_of_its_own() -> None:
    found = agreement(Chooser(0.9), constitution(), [RIGHT] * 8, panel=1, seed=0)
    under = {name: value["n"] for name, value in found.items() if name.startswith("accuracy.")}
    assert sum(under.values()) == 8
    assert set(under) <= {"accuracy.calm", "accuracy.plain", "accuracy.brief"}
    assert len(under) > 1


def test_pairs_that_do_not_fit_are_counted_and_none_at_all_is_an_error() -> None:
    found = agreement(Chooser(), constitution(), [RIGHT, pair("good", "too_long")], panel=2, seed=0)
    assert (found["too_long"], found["accuracy"]["n"]) == (1, 1)
    with pytest.raises(AlignError, match="no pair fits"):
        agreement(Chooser(), constitution(), [pair("good", "too_long")], panel=2, seed=0)


def test_a_critic_that_is_never_wrong_and_wholly_sure_has_a_finite_loss() -> None:
    found = agreement(Chooser(1.0), constitution(), [RIGHT, WRONG], panel=1, seed=0)
    assert math.isfinite(found["loss"]["value"])


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stage = "{kind: critique, prompts: asked, constitution: rules.yaml, max_new_tokens: 8}"
    port = port_in(tmp_path, tiny_llama, {"revised": stage})
    rows = [{"prompt": "hello", "chosen": "zzz", "rejected": "abc"}] * 3
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return port.recipe


def test_the_command_judges_and_makes_nothing(recipe: Path, align_home: Path) -> None:
    command = ["critique", str(recipe), "--judge-only", "--data", "judged.jsonl", "--json"]
    done = CliRunner().invoke(cli, [*command, "--set", "stages.revised.critic={kind: judge, file: judge.yaml}"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["stage"] == "revised"
    assert found["metrics"]["accuracy"]["value"] == 1.0  # the judge's rules forbid a, b and c
    assert not list(align_home.glob("runs/*"))


def test_the_model_itself_judges_from_log_probabilities(recipe: Path) -> None:
    done = CliRunner().invoke(cli, ["critique", str(recipe), "--judge-only", "--data", "judged.jsonl"])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout
    assert "consistent" in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--judge-only"], "--judge-only needs --data"),
        (["--data", "judged.jsonl"], "go with --judge-only"),
        (["--judge-only", "--data", "judged.jsonl", "--force", "revised"], "makes nothing"),
        (["--judge-only", "--data", "judged.jsonl", "--report", "page.html"], "makes nothing"),
        (["--judge-only", "--data", "asked.jsonl"], "no preference pairs"),
        (["--judge-only", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--judge-only", "--data", "judged.jsonl", "--stage", "other"], "revised"),
    ],
)
def test_wrong_use_is_said_in_words(recipe: Path, options: list[str], told: str) -> None:
    done = CliRunner().invoke(cli, ["critique", str(recipe), *options])
    assert done.exit_code != 0
    assert told in f"{done.output}{done.exception}"
