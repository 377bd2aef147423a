"""`make bench` in its smallest form: both sides run, their losses are compared, and rows are merged into one page."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: no peer to run")


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of benchmarks/ as its scripts see them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_page
    import bench_rows

    return bench_page, bench_rows


def train_result(losses: list[float], seconds: float) -> dict[str, object]:
    return {
        "seconds": seconds, "processor_seconds": seconds, "total_seconds": seconds, "units": 100, "steps": 2,
        "losses": losses, "peak_mib": 500.0, "flops": 1e9, "flops_per_second": 1e10, "reference_seconds": 0.0,
    }  # fmt: skip


def measured(row, off: float = 0.0, start: float = 10.0) -> dict[str, object]:
    """A row of which every side took twice our second; the losses of the others are `off`."""
    sides = {
        side.name: [train_result([start, 9.0 + off * (side.name != "align")], 1.0 if side.name == "align" else 2.0)]
        for side in row.sides
    }
    place = {"machine": "m", "versions": {}, "device": "cpu"}
    return {
        "date": "d",
        "precision": "float32",
        "threads": 1,
        "turns": 1,
        "elapsed_seconds": 1,
        "sides": sides,
        **place,
    }


@pytest.mark.slow
@needs_trl
def test_quick_run_trains_both_sides_to_the_same_losses(tmp_path):
    page = tmp_path / "page.md"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench.py", "--quick", "--only", "sft", "--threads", "1", "--out", page],
        env=os.environ | {"OMP_NUM_THREADS": "1", "BENCH_CACHE": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    sides = json.loads(page.with_suffix(".json").read_text())["sft-1m"]["sides"]
    ours, trl = (sides[name][0]["losses"] for name in ("align", "TRL 1.16, default"))
    assert ours == pytest.approx(trl, rel=1e-4)
    assert ours[0] - ours[-1] > 0.05, "training moved the loss, so the comparison says something"
    assert sides["TRL 1.16, default"][0]["units"] == sides["align"][0]["units"], "both count the same real tokens"
    assert "| SFT 1m over TRL default |" in page.read_text()


def test_losses_that_differ_or_did_not_move_are_problems(benchmarks):
    bench_page, bench_rows = benchmarks
    row = bench_rows.ROWS[0]
    assert bench_page.agreement(row, measured(row)).problems == []
    assert "off by" in bench_page.agreement(row, measured(row, off=0.1)).problems[0]
    assert "hardly learnt" in bench_page.agreement(row, measured(row, start=9.01)).problems[0]


def test_ratio_counts_the_peer_over_ours_and_a_miss_says_so(benchmarks):
    bench_page, bench_rows = benchmarks
    row = bench_rows.ROWS[0]
    first = bench_page.verdicts(row, measured(row))[0]
    assert (first.value, first.met) == (2.0, False)
    text = bench_page.page(bench_rows.ROWS, {row.key: measured(row)}, "")
    assert "**missed**, reason not found yet" in text
    assert "Not measured yet: sft-135m" in text


def test_reasons_written_by_hand_stay_and_are_linked(benchmarks):
    bench_page, bench_rows = benchmarks
    row = bench_rows.ROWS[0]
    before = "# old\n\n## Reasons\n\nsft-15m: no bfloat16 here.\n"
    text = bench_page.page(bench_rows.ROWS, {row.key: measured(row)}, before)
    assert text.endswith("## Reasons\n\nsft-15m: no bfloat16 here.\n")
    assert "# old" not in text
    assert "**missed**: [sft-15m](#reasons)" in text


def test_only_takes_keys_and_families_and_refuses_others(benchmarks):
    _, bench_rows = benchmarks
    rows = list(bench_rows.ROWS)
    assert [row.key for row in bench_rows.chosen_rows(rows, "sft,dpo-15m")] == ["sft-15m", "sft-135m", "dpo-15m"]
    with pytest.raises(SystemExit, match="unknown row 'sfd'"):
        bench_rows.chosen_rows(rows, "sfd")
