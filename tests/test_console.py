"""The terminal: bars where somebody watches, plain notes where nobody does, tables that data cannot steer."""

from __future__ import annotations

import contextlib
import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from align.checks import DataCheck
from align.console import ConsoleProgress, data_table, plan_table, print_table, stage_table
from tests.report_chain import HOSTILE, filled_registry


def terminal(width: int = 120, **given: object) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, **given)


def pipe(encoding: str = "utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), width=80)


def written(console: Console) -> str:
    file = console.file
    return file.buffer.getvalue().decode(file.encoding) if isinstance(file, io.TextIOWrapper) else file.getvalue()


def table_text(table: object, width: int = 120) -> str:
    console = terminal(width)
    print_table(table, console)
    return written(console)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list:
    registry = filled_registry(tmp_path_factory.mktemp("console"))
    return list(reversed(registry.all_checkpoints()))


def test_where_nobody_watches_bars_are_silent_and_notes_are_plain_lines() -> None:
    console = pipe()
    progress = ConsoleProgress(console)
    with progress.bar("training", 10) as bar:
        for _ in range(10):
            bar.advance(1, tokens=100, note="loss 1.2")
    assert written(console) == ""
    progress.note("harbour/sft: run (not made yet) " + "and so on " * 20)
    assert written(console).count("\n") == 1, "a note is one line, however long"


def test_a_bar_shows_count_share_speed_note_and_time_left() -> None:
    console = terminal()
    with ConsoleProgress(console).bar("training [bold]x[/bold]", 200) as bar:
        for _ in range(50):
            bar.advance(1, tokens=1000, note="loss 1.234")
        bar._shown.refresh()
    text = written(console)
    assert "training [bold]x[/bold]" in text, "a title is no markup"
    assert "50/200  25%" in text
    assert re.search(r"[\d,]+ tokens/s", text)
    assert "loss 1.234" in text
    assert re.search(r"training .*: 50 of 200 in [\d.]+ s, [\d,]+ tokens/s", text), "what took how long stays"


def test_a_bar_inside_a_bar_and_one_that_fails_leave_the_terminal_as_it_was() -> None:
    console = terminal()
    progress = ConsoleProgress(console)
    with contextlib.suppress(KeyboardInterrupt), progress.bar("outer", 2), progress.bar("inner", 3) as inner:
        inner.advance(1)
        raise KeyboardInterrupt
    text = written(console)
    assert "inner: 1 of 3" in text
    assert "outer: 0 of 2" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and shown again"
    with progress.bar("again", 1) as bar:
        bar.advance()
    assert "again: 1 of 1" in written(console)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_stages_fits_and_keeps_every_number(checkpoints: list, width: int) -> None:
    text = table_text(stage_table([c for c in checkpoints if c.name.startswith("harbour")]), width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("harbour: held-out numbers", "sft", "81.0%", "75.6 to 86.4%", "+79.0 pt", "unclear", "parity holds"):
        assert word in text
    assert "…" not in text


def test_a_loop_stands_for_all_rounds_up_to_the_one_that_is_kept() -> None:
    def made(name: str, before: float, after: float) -> SimpleNamespace:
        def share(value: float) -> dict[str, float]:
            return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 300}

        metrics = {"before.judge.violation_rate": share(before), "after.judge.violation_rate": share(after)}
        metrics |= {"before.judge.correct": share(0.5), "after.judge.correct": share(0.5)}
        return SimpleNamespace(name=f"x/{name}", kind="model", recipe={"settings": {"kind": "sft"}}, metrics=metrics)

    text = table_text(stage_table([made("loop.1", 0.4, 0.2), made("loop.2", 0.2, 0.1), made("loop", 0.2, 0.1)]))
    *_, last = [line for line in text.splitlines() if line.startswith("loop")]
    assert "Answers with a violation" in last
    assert re.search(r"40\.0%.*10\.0%.*better", last)


def test_data_cannot_steer_the_terminal() -> None:
    record = SimpleNamespace(
        name="x/[red]\x1b[31m", kind="model", recipe={}, metrics={"after.\x1b]0;t\x07[link=file:///]y": 1.0}
    )
    console = terminal()
    ConsoleProgress(console).note(" ".join(HOSTILE[:6]) + HOSTILE[6].replace("\ud800", "") + "[bold]b[/bold]")
    text = table_text(stage_table([record])) + written(console)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]" in text
    assert "[bold]b[/bold]" in text


def test_ascii_terminals_get_ascii(checkpoints: list) -> None:
    console = pipe("ascii")
    ConsoleProgress(console).note("merged → done − 3 ✓")
    print_table(stage_table(checkpoints), console)
    assert "merged > done - 3 +" in written(console)
    assert re.search(r"adapter +Correct answers +81.0% +> +93.0%", written(console))


def test_in_a_pipe_tables_fold_nothing(checkpoints: list) -> None:
    console = pipe()
    print_table(stage_table(checkpoints), console)
    assert "harbour/adapter  Correct answers" in written(console)


def test_the_plan_and_the_data_report_say_all_they_know() -> None:
    cost = SimpleNamespace(peak_memory_bytes=3 * 2**30, seconds=75.0)
    planned = [
        SimpleNamespace(name="sft", kind="sft", action="run", why="changed: settings.epochs 1 -> 2", estimate=cost)
    ]
    assert re.search(
        r"sft +sft +run +3.0 GiB +1 min 15 s +changed: settings.epochs 1 -> 2", table_text(plan_table(planned))
    )
    report = {
        "format": "hh",
        "rows_read": 1300,
        "train_rows": 1100,
        "test_rows": 130,
        "duplicates": 70,
        "warnings": ["odd"],
    }
    lengths = {"rows": 1100, "dropped": 9, "tokens": 1000, "trained_tokens": 250, "p50": 40, "p95": 90, "longest": 130}
    text = table_text(data_table([DataCheck("pairs", report, {"reward": lengths})]), 160)
    for words in (
        "1,300",
        "1,100",
        "hh, 70 duplicates",
        "for reward",
        "25.0% of tokens trained",
        "9 rows dropped for length",
        "! odd",
    ):
        assert words in text


def test_a_missing_number_is_said_and_no_error() -> None:
    record = SimpleNamespace(name="x/y", kind="model", recipe={"settings": {"kind": "sft"}}, metrics={})
    assert "not measured" in table_text(stage_table([record]))
