"""SIGKILL at random moments of preparing, training, saving and registering: nothing lost, nothing half, the same bytes.

How often: ALIGN_KILLS (200 by default). Which moments: ALIGN_KILL_SEED.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from align.cli.runs import runs_group
from align.registry import Registry
from align.state import complete_states
from align.trainer import TRAINED
from tests.critique_kit import Port
from tests.resume_cases import CASES, Case, made, model_of, port_of, started

LOOPED = ("pretrain", "sft-dropout-neftune", "sft-nf4-dora", "reward", "dpo-sigmoid", "dpo-kto", "ppo-gae", "ppo-grpo", "critique")  # fmt: skip
KILLS = int(os.environ.get("ALIGN_KILLS", "200"))
SEED = int(os.environ.get("ALIGN_KILL_SEED", "0"))


@dataclass
class Loop:
    """One stage, begun again and again until it ends by itself; then the next time.

    seconds, calls: of the disk and the database, of a run that is not stopped. moments: where the kills fell.
    """

    case: Case
    folder: Path
    model: Path
    whole: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0
    finished: int = 0
    moments: Counter[str] = field(default_factory=Counter)

    def measure(self) -> None:
        """The bytes of a run that was never stopped, and how long it takes."""
        port = port_of(self.case, self.folder / "whole", self.model)
        began = time.monotonic()
        process = started(port.folder)
        process.join()
        self.seconds = time.monotonic() - began
        assert process.exitcode == 0
        self.whole, self.calls = made(port), int((port.folder / "calls").read_text())

    def kill(self, chance: random.Random) -> bool:
        """One more run of what is there now, killed at any moment, or call, of a whole run: True; if it ends before, the next
        begins: False."""
        port = self.port
        if chance.random() < 0.5:
            process = started(port.folder)
            process.join(chance.uniform(0, self.seconds))
            process.kill()
        else:
            process = started(port.folder, calls=chance.randrange(self.calls))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), "an error of its own"
        if process.exitcode == 0:
            self.end()
            return False
        self.moments[moment(port)] += 1
        check(port)
        return True

    @property
    def port(self) -> Port:
        """The recipe that is being worked on."""
        folder = self.folder / str(self.finished)
        return Port(folder, folder / "port.yaml") if folder.is_dir() else port_of(self.case, folder, self.model)

    def end(self) -> None:
        """Lets the run that was killed end, and compares."""
        port = self.port
        process = started(port.folder)
        process.join()
        assert process.exitcode == 0
        assert made(port) == self.whole, "resumed is not never stopped"
        registry = port.workshop().registry
        registry.gc()
        assert registry.gc(dry_run=True) == []
        assert {run.status for run in registry.all_runs()} == {"finished"}
        self.finished += 1


def moment(port: Port) -> str:
    """Where the last kill fell, by what lies there."""
    work = next(
        iter(sorted((port.folder / "home" / "runs").glob("*"), key=lambda path: path.stat().st_mtime)[-1:]), None
    )
    if work is None:
        return "before the run"
    if (work / "finish.json").exists() or not (work / "artifact").exists():
        return "registering"
    if any(not (state / "complete.json").exists() for state in work.glob("state/checkpoint-*")):
        return "saving a state"
    if any((work / "artifact").iterdir()):
        return "writing the result"
    return "training, from a saved state" if list(work.glob("state/*")) else "training"


def check(port: Port) -> None:
    """What a person sees after a kill: the run is dead, and everything that is offered is whole."""
    home = port.folder / "home"
    listed = CliRunner().invoke(runs_group, ["list", "--json"], env={"ALIGN_HOME": str(home)}, catch_exceptions=False)
    assert "running" not in {run["status"] for run in json.loads(listed.stdout)}
    registry = Registry.open(home)
    for record in (*registry.all_checkpoints(), *registry.all_data()):
        registry.check_unchanged(record)
    for record in registry.all_checkpoints():
        assert registry.verify(record.id) == []
    for run in registry.all_runs():
        for state in complete_states(run.work / "state"):
            load_file(state / TRAINED)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_any_moment_nothing_is_lost_and_the_end_is_the_same(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, loops = random.Random(SEED), []
    for name in LOOPED:
        case = Case(CASES[name].stage.replace("save_steps: 2", "save_steps: 1"), CASES[name].model)
        loops.append(Loop(case, tmp_path / name, model_of(case, request)))
        loops[-1].measure()
    kills, turns = 0, cycle(loops)
    while kills < KILLS:
        kills += next(turns).kill(chance)
    for loop in loops:
        loop.end()
    moments: Counter[str] = sum((loop.moments for loop in loops), Counter())
    with capsys.disabled():
        print(f"\n{KILLS} kills, {sum(loop.finished for loop in loops)} runs ended: {told(moments)}")  # noqa: T201


def told(moments: Counter[str]) -> str:
    """Counts in words."""
    return ", ".join(f"{count} {name}" for name, count in moments.most_common())
