"""Files that may not be as large as they would become (`ulimit -f`, FAT): said as a full disk is, exit code 1."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from align.errors import StageFailed, of_the_file_system
from align.registry.artifacts import disk_errors_explained

ALIGN = "from align.cli.main import main; main()"
UNDER_LIMIT = 'ulimit -f "$1"; shift; exec "$@"'


def test_a_file_that_may_not_grow_is_of_the_machine() -> None:
    known = of_the_file_system(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "report.html"))
    assert isinstance(known, StageFailed)
    assert ("report.html" in known.message, "ulimit -f" in known.hint) == (True, True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_weights_that_may_not_grow_are_said_in_words(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(StageFailed, match=r"cannot be written: .*(?i:large)") as failed,
        disk_errors_explained(tmp_path),
    ):
        raise error
    assert "nothing is lost" in failed.value.hint


def test_rows_that_do_not_fit_fail_without_a_traceback(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{number} " * 40}) + "\n" for number in range(2000)))
    arguments = ["data", "add", str(rows), "--name", "rows"]
    done = subprocess.run(
        ["sh", "-c", UNDER_LIMIT, "sh", "40", sys.executable, "-c", ALIGN, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "ALIGN_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
