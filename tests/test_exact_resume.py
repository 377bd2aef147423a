"""Stopped by a signal or killed, and resumed, every stage ends in the very bytes of a run that was never stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from align.errors import Interrupted
from align.stopping import signals_handled
from tests.resume_cases import CASES, Case, made, model_of, port_of, skipped, started
from tests.test_run import SignalAt

TRAINING = {name: case for name, case in CASES.items() if case.trains}  # a critique: tests/test_critique_stage.py
STOPS = (2, 5)  # a state has just been saved; a step later in an epoch


@pytest.mark.parametrize(
    "name", [name if case.quick else pytest.param(name, marks=pytest.mark.slow) for name, case in TRAINING.items()]
)
def test_stopped_and_resumed_is_never_stopped_to_the_bit(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TRAINING[name]
    _prepare(case, monkeypatch)
    model = model_of(case, request)
    whole, stopped = (port_of(case, tmp_path / folder, model) for folder in ("whole", "stopped"))
    assert whole.run() == {"x": "run"}
    for step in STOPS:
        with signals_handled(), pytest.raises(Interrupted) as stop:
            stopped.run(progress=SignalAt(step))
        assert stop.value.exit_code == 128 + signal.SIGTERM
        assert stopped.workshop().registry.all_runs()[0].status == "interrupted"
    assert stopped.run() == {"x": "resume"}
    assert made(stopped) == made(whole)
    assert skipped(stopped) == skipped(whole)
    assert bool(skipped(whole)) == (case.few is not None)
    assert len(stopped.workshop().registry.all_runs()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_killed_after_a_saved_state_and_resumed_is_never_stopped_to_the_bit(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TRAINING[name]
    _prepare(case, monkeypatch)
    model = model_of(case, request)
    whole, killed = (port_of(case, tmp_path / folder, model) for folder in ("whole", "killed"))
    whole.run()
    for step in (4, 7):  # the states of steps 2 and 6 are on disk
        process = started(killed.folder, step, few=case.few)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert killed.workshop().registry.all_runs()[0].status == "crashed"
    assert killed.run() == {"x": "resume"}
    assert made(killed) == made(whole)
    assert len(killed.workshop().registry.all_runs()) == 1


def _prepare(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.few is not None:
        monkeypatch.setattr("align.bad_steps.FEWEST", case.few)
