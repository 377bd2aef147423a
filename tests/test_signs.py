"""Signs of a training that went wrong though nothing failed: each is seen by its own numbers, and a good log shows none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.progress import Progress
from align.recipe.settings import SftSettings
from align.registry import Registry
from align.report import write_report
from align.run import RunProgress
from align.signs import signs
from tests.registry_fill import begin, finish

LN2 = math.log(2)


def log(
    loss: Sequence[float], norm: Sequence[float] = (1.0, 1.2, 0.9), first: int = 1
) -> dict[str, list[tuple[int, float]]]:
    return {
        "train.loss": [(first + 10 * place, value) for place, value in enumerate(loss)],
        "train.grad_norm": [(first + 10 * place, value) for place, value in enumerate(norm)],
    }


@pytest.mark.parametrize(
    ("kind", "settings", "loss"),
    [
        ("sft", {}, (5.8, 4.0, 3.1)),
        ("pretrain", {}, (6.9, 3.0)),
        ("dpo", {}, (LN2, 0.5, 0.3)),
        ("dpo", {"loss": {"kind": "robust"}}, (LN2 + 0.005, 0.6)),
        ("dpo", {"loss": {"kind": "ipo"}}, (25.0, 9.0)),
        ("dpo", {"loss": "simpo"}, (1.4, 1.0)),
        ("reward", {}, (0.7, 0.3)),
        ("ppo", {}, (0.01, 0.5)),
        ("sft", {}, ()),
    ],
)
def test_a_good_log_shows_no_sign(kind: str, settings: dict[str, Any], loss: tuple[float, ...]) -> None:
    assert signs(kind, settings, log(loss)) == {}


@pytest.mark.parametrize(
    ("kind", "settings", "numbers", "words"),
    [
        ("dpo", {}, log((0.6748, 0.5)), "did not start out equal to its reference"),
        ("dpo", {"loss": {"kind": "sigmoid"}}, log((0.75, 0.5)), "did not start out equal to its reference"),
        ("reward", {}, log((0.1, 0.05)), "told apart before anything was learnt"),
        ("sft", {}, log((0.0, 0.0)), "there was nothing to learn"),
        ("pretrain", {}, log((0.0, 0.0)), "there was nothing to learn"),
        ("sft", {}, log((3.0, 2.5), (0.0, 0.0, 0.0)), "The gradient was 0 at every logged step"),
        ("sft", {}, log((3.0, 2.5), (1.0, 1.1, 900.0, 1.0)), "900 at step 21, where 1.05 is usual: it exploded"),
        ("sft", {}, log((3.0, 7.0)), "went from 3 to 7"),
    ],
)
def test_each_sign_is_seen(kind: str, settings: dict[str, Any], numbers: Any, words: str) -> None:
    (said,) = signs(kind, settings, numbers).values()
    assert words in said


def test_a_log_that_begins_later_says_nothing_of_the_start() -> None:
    assert signs("dpo", {}, log((0.5, 0.4), first=10)) == {}


@pytest.mark.parametrize("loss", [(math.nan, 3.0), (3.0, math.inf), ()])
@pytest.mark.parametrize("norm", [(math.nan,), (1.0, 1.0, math.inf), ()])
def test_numbers_that_are_not_finite_are_no_sign(loss: Sequence[float], norm: Sequence[float]) -> None:
    assert signs("sft", {}, log(loss, norm)) == {}


@pytest.mark.parametrize("norm", [(0.0, 1.0, 0.0), (1.0, 900.0), (0.0, 0.0, 900.0)])
def test_a_gradient_that_is_sometimes_nothing_or_has_too_short_a_log_is_no_sign(norm: Sequence[float]) -> None:
    assert signs("sft", {}, log((3.0, 2.5), norm)) == {}


def test_the_report_shows_a_sign_where_its_stage_stands(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "home")
    with begin(registry) as run:
        run.log_metrics(1, {"train.loss": 3.0, "train.grad_norm": 0.0})
        run.log_metrics(9, {"train.loss": 3.0, "train.grad_norm": 0.0})
        finish(run, "harbour/sft", "weights")
    write_report(registry, "harbour", tmp_path / "page.html")
    assert "The gradient was 0 at every logged step" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_sign_is_said_once_while_the_stage_runs() -> None:
    noted: list[str] = []
    run = SimpleNamespace(log=noted.append, log_metrics=lambda *_: None)
    progress = RunProgress(Progress(), run, SftSettings(kind="sft", data="d"))  # type: ignore[arg-type]
    for step, loss in ((1, 2.0), (2, 2.1), (3, 9.0), (4, 9.5)):
        progress.metrics(step, {"train.loss": loss, "train.grad_norm": 1.0})
    assert len(noted) == 1
    assert noted[0].startswith("warning: The training loss went from 2 to 9")
