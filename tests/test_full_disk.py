"""A disk that is really full: a run says so, and goes on to the same bytes once there is room. Needs a small tmpfs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.critique_kit import brisk_llama

ROOT = Path(__file__).parents[1]
SMALL = 'mount -t tmpfs -o size="$1" none "$0" && shift && exec "$@"'

REGISTERED = """
import json, sys
from pathlib import Path
from align.errors import AlignError
from align.registry import Registry
from align.registry.artifacts import disk_errors_explained
from tests.registry_fill import begin, finish

home = Path(sys.argv[1]) / "home"
registry, made, said = Registry.open(home), 0, []
ballast = home.parent / "ballast"
ballast.write_bytes(b"x" * 300_000)
while not said:
    try:
        with begin(registry, key="k") as run:
            with disk_errors_explained(run.work):  # as for the work of a stage
                (run.artifact / "weights").write_bytes(bytes([made]) * 200_000)
            finish(run, "harbour/sft", f"{made}")
        made += 1
    except AlignError as error:
        said = [type(error).__name__, str(error)]
registry = Registry.open(home)
whole = all(registry.verify(record.id) == [] for record in registry.all_checkpoints())
status = registry.all_runs()[0].status
ballast.unlink()
registry.recover()
last = registry.resumable("k")
if last:
    with registry.resume_run(last.id) as run:
        finish(run, "harbour/sft", "the last")
print(json.dumps({"made": made, "said": said, "whole": whole, "status": status, "now": len(registry.all_checkpoints())}))
"""

TRAINED = """
import json, sys
from pathlib import Path
from align.errors import StageFailed
from tests.resume_cases import CASES, made, port_of

place, model = Path(sys.argv[1]), Path(sys.argv[2])
case = CASES["reward"]
whole = port_of(case, Path(sys.argv[3]), model)
whole.run()
port = port_of(case, place / "port", model)
Path(port.folder / "home").mkdir()
ballast = place / "ballast"
free = int(sys.argv[4])
import shutil
ballast.write_bytes(b"x" * max(0, shutil.disk_usage(place).free - free))
try:
    port.run()
    said = ""
except StageFailed as error:
    said = error.message
status = [run.status for run in port.workshop().registry.all_runs()]
ballast.unlink()
action = port.run()["x"]
print(json.dumps({"said": said, "status": status, "action": action, "same": made(port) == made(whole)}))
"""


def on_small_disk(code: str, size: str, *arguments: object) -> dict[str, object]:
    """What the code prints, with an empty disk of that size at its first argument; skips where there is none to be had."""
    place = Path(str(arguments[0]))
    place.mkdir()
    mounted = ["unshare", "--mount", "sh", "-c", SMALL, str(place), size]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here: they need root and util-linux; tests/test_registry_faults.py has a shim")
    command = [*mounted, sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_registering_on_a_full_disk_is_said_and_goes_on_with_room(tmp_path: Path) -> None:
    seen = on_small_disk(REGISTERED, "2m", tmp_path / "small")
    assert seen["said"][0] == "StageFailed", seen
    assert "cannot be written" in seen["said"][1]
    assert seen["whole"] is True
    assert seen["status"] in ("failed", "crashed")
    assert seen["now"] == seen["made"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("free", [200_000, 600_000, 1_200_000])
def test_training_on_a_full_disk_is_said_and_goes_on_to_the_same_bytes(
    free: int, tiny_tokenizer, tmp_path: Path
) -> None:
    brisk = brisk_llama(tiny_tokenizer, tmp_path / "brisk")
    seen = on_small_disk(TRAINED, "64m", tmp_path / "small", brisk, tmp_path / "whole", free)
    assert seen["same"] is True, seen
    assert not seen["said"] or any(words in str(seen["said"]) for words in ("No space left", "disk is full")), seen
    assert "running" not in seen["status"]
