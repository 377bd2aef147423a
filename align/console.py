"""What a person sees in the terminal: progress bars on stderr, and the table of held-out numbers at the end.

Nothing from data can steer the terminal: names and notes pass `words.one_line` and are shown as they are, without
markup. Where stderr is no terminal, bars are silent and notes are plain lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from align.progress import Bar, Progress
from align.registry.records import StageData
from align.report import words
from align.report.data_view import DROPPED
from align.report.numbers import Change, Number, headline, parity, raised_guards
from align.units import in_units

if TYPE_CHECKING:
    from align.checks import DataCheck
    from align.plan import PlannedStage
    from align.registry import CheckpointRecord

WIDE = 76  # columns from which there is room for tokens per second and the note
WIDEST = 400  # columns of a table that goes into a file or a pipe
_TOKENS = {"p50": "tokens median", "p95": "at 95%", "longest": "longest"}
_LENGTH_DROPS = {
    "dropped": "rows dropped for length",
    "cut": "rows cut",
    "cut_without_stop": "of them without stop token",
    "cut_prompts": "prompts cut",
    "without_answer": "rows left without answer",
    "equal_pairs": "pairs made equal by the cut",
    "untrainable_turns": "turns that the template changes, not trained",
}
_STYLES = {"better": "bold blue", "worse": "bold yellow", "unclear": "dim"}
_ASCII = str.maketrans("−→–…·≈✓✗▲▼", "->-.-~+x^v")  # one for one, so that columns stay straight


class ConsoleProgress(Progress):
    """Bars with count, share, tokens per second, note and time left. A bar inside a bar stands below it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._shown: RichProgress | None = None

    def note(self, text: str) -> None:
        """One line above the bars, or on its own."""
        line = "\n".join(words.printable(text).splitlines())
        self.console.print(Text(_encodable(line, self.console)), soft_wrap=not self.console.is_terminal)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar for `total` units; it is gone from the screen when all bars are closed, a note says what took how long."""
        if not self.console.is_terminal:
            with super().bar(title, total) as silent:
                yield silent
            return
        outermost = self._shown is None
        shown = self._shown = self._shown or RichProgress(*_columns(self.console), console=self.console, transient=True)
        if outermost:
            shown.start()
        task = shown.add_task(words.one_line(title, 32), total=total, tokens=0, note="")
        try:
            yield _ConsoleBar(shown, task)
        finally:
            self._close(shown, task, outermost)

    def _close(self, shown: RichProgress, task: TaskID, outermost: bool) -> None:
        done = next(found for found in shown.tasks if found.id == task)
        spent = words.duration(done.finished_time or done.elapsed or 0.0)
        counted = f"{_count(done.completed)} of {_count(done.total or 0)}"
        rate = f", {_rate(done)}" if _rate(done) else ""
        shown.remove_task(task)
        if outermost:
            shown.stop()
            self._shown = None
        self.note(f"{done.description}: {counted} in {spent}{rate}")


class _ConsoleBar:
    def __init__(self, shown: RichProgress, task: TaskID) -> None:
        self._shown, self._task = shown, task

    def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
        task = next(found for found in self._shown.tasks if found.id == self._task)
        fields = {"tokens": task.fields["tokens"] + tokens, "note": words.one_line(note, 28) or task.fields["note"]}
        self._shown.update(self._task, advance=amount, **fields)


class _Counts(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Units done of all, and the share."""
        share = f"{task.percentage:3.0f}%"
        return Text(f"{_count(task.completed)}/{_count(task.total or 0)} {share}")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Tokens per second since the bar opened, then the note."""
        return Text("  ".join(part for part in (_rate(task), str(task.fields["note"])) if part), style="cyan")


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Time left at the present speed."""
        left = task.time_remaining
        if not left:
            return Text("")
        return Text(f"{words.duration(left) if left >= 10 else f'{left:.0f} s'} left", style="dim")


def stage_table(made: Iterable[CheckpointRecord | StageData]) -> Table:
    """The number that each stage is there to move, parent -> child on held-out rows, 95% intervals below.

    For a stage that makes data it is what the last revisions are worth, against the first answers.
    """
    records = list(made)
    recipes = {record.name.rpartition("/")[0] for record in records}
    table = _table(stage="", measured="", parent="right", **{"": ""}, child="right", change="right", verdict="")
    table.title = words.one_line(f"{recipes.pop()}: held-out numbers") if len(recipes) == 1 else None
    named = {record.name: record for record in records}
    for record in records:
        name = record.name.rpartition("/")[2] if table.title else record.name
        change = headline(*_moved(record, named.get(f"{record.name}.1")))
        cells = _cells(name, change) if change else [name, "not measured"]
        if (holds := parity(record.metrics)) is not None:
            cells[-1] = "parity holds" if holds else "parity broken"
        cells[-1] += _guard_words(record.metrics)
        table.add_row(*(_cell(text) for text in cells))
    return table


def plan_table(stages: Iterable[PlannedStage]) -> Table:
    """What a recipe would do: action and reason of each stage, with predicted memory and time where they are known."""
    table = _table(stage="", kind="", action="", memory="right", time="right", why="")
    for stage in stages:
        memory, seconds = stage.estimate.peak_memory_bytes, stage.estimate.seconds
        cost = [in_units(memory) if memory else "", words.duration(seconds) if seconds else ""]
        table.add_row(*(_cell(text) for text in (stage.name, stage.kind, stage.action, *cost, stage.why)))
    return table


def data_table(checked: Iterable[DataCheck]) -> Table:
    """What became of the rows of each data set, below it their lengths under each stage that trains on it, and warnings."""
    table = _table(data="", read="right", train="right", **{"held out": "right"}, notes="")
    for entry in checked:
        report = entry.report
        counts = [_count(report.get(key) or 0) for key in ("rows_read", "train_rows", "test_rows")]
        dropped = [f"{_count(report[key])} {title.lower()}" for key, title in DROPPED.items() if report.get(key)]
        notes = [str(report.get("format", "")), *dropped]
        table.add_row(*(_cell(text) for text in (entry.name, *counts, ", ".join(note for note in notes if note))))
        for stage, lengths in entry.stages.items():
            table.add_row(*(_cell(text) for text in (f"  for {stage}", "", "", "", _length_words(lengths))))
        for warning in report.get("warnings") or ():
            table.add_row("", "", "", "", Text(f"! {words.one_line(warning, 400)}", style="yellow"))
    return table


def _length_words(lengths: Mapping[str, int]) -> str:
    """Tokens of the rows, the share that is trained, and what the length policy did."""
    said = [f"{lengths[key]:,} {name}" for key, name in _TOKENS.items() if lengths.get(key)]
    if lengths.get("tokens") and "trained_tokens" in lengths:
        said.append(
            f"{words.number(lengths.get('trained_tokens', 0) / lengths['tokens'], share=True)} of tokens trained"
        )
    return ", ".join(said + [f"{lengths[key]:,} {name}" for key, name in _LENGTH_DROPS.items() if lengths.get(key)])


def print_table(table: Table, console: Console | None = None) -> None:
    """A table on stdout; in a pipe as wide as it needs to be, in ASCII where nothing else can be shown."""
    console = console or Console()
    if not console.is_terminal:
        console.width = WIDEST
    with console.capture() as drawn:
        console.print(table)
    console.file.write(_encodable(drawn.get(), console))


def _table(**columns: str) -> Table:
    """A table without lines; columns: heading -> `right` for numbers."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left", title_style="bold")
    for heading, side in columns.items():
        made.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    return made


def _cells(name: str, change: Change) -> list[str]:
    parent = f"{change.words(change.before)}\nchance" if change.baseline == "chance" else _spread(change, change.before)
    moved = change.difference_words().replace(" points", " pt")
    verdict = "" if change.verdict == "none" else change.verdict
    arrow = "→" if change.before else ""
    return [name, change.meaning.label, parent, arrow, _spread(change, change.after), moved, verdict]


def _guard_words(metrics: Mapping[str, Any]) -> str:
    """A line below the verdict that says which guards a ppo run raised, and which one stopped it; or nothing."""
    if metrics.get("stopped_by"):
        return f"\nstopped by: {metrics['stopped_by']}"
    raised = raised_guards(metrics)
    return f"\nguards: {', '.join(raised)}" if raised else ""


def _spread(change: Change, value: Number | None) -> str:
    interval = change.interval_words(value)
    return change.words(value) + (f"\n{interval}" if interval else "")


def _cell(text: str) -> Text:
    """One cell: its first line in the colour of its verdict, what stands below in grey; nothing in it is markup."""
    first, _, below = text.partition("\n")
    indent = first[: len(first) - len(first.lstrip())]
    cell = Text(indent + words.one_line(first, 400), style=_STYLES.get(first, ""))
    return cell.append(f"\n{words.one_line(below)}", style="dim") if below else cell


def _moved(record: CheckpointRecord | StageData, first: CheckpointRecord | StageData | None) -> tuple[Any, str]:
    """Numbers of a stage and the kind that chooses the one to show. What a loop and its rounds move are violations.

    first: round 1, where the stage is a loop, which stands for all rounds from the start to the one that is kept.
    """
    if first is None:
        is_round = "." in record.name.rpartition("/")[2]
        return record.metrics, "critique" if is_round else _kind(record)
    start = {name: value for name, value in first.metrics.items() if name.startswith("before.")}
    return start | {name: value for name, value in record.metrics.items() if name.startswith("after.")}, "critique"


def _kind(record: CheckpointRecord | StageData) -> str:
    if isinstance(record, StageData):
        return record.kind
    settings = record.recipe.get("settings", record.recipe)
    kind = settings.get("kind", "") if isinstance(settings, Mapping) else ""
    return str(kind) or record.kind


def _columns(console: Console) -> list[ProgressColumn]:
    speed = [_Speed(table_column=Column(no_wrap=True))] if console.width >= WIDE else []
    title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=32))
    return [title, BarColumn(bar_width=None), _Counts(Column(no_wrap=True)), *speed, _TimeLeft(Column(no_wrap=True))]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _rate(task: Task) -> str:
    seconds = task.finished_time or task.elapsed or 0.0
    return f"{task.fields['tokens'] / seconds:,.0f} tokens/s" if task.fields["tokens"] and seconds > 0 else ""


def _encodable(text: str, console: Console) -> str:
    if console.encoding.lower().startswith("utf"):
        return text
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")
