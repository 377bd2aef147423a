"""`align data`: look into data files, and keep them in the registry."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from align.cli.listing import TABLE_ROWS, limit_option, more_note, print_json_rows

if TYPE_CHECKING:
    from align.data.examples import Example
    from align.data.inspection import FileReport
    from align.recipe.settings import DataSettings

    Spans = list[tuple[str, bool]]  # text of one row in pieces, and whether the piece is trained

FORMAT_NAMES = (
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preferences", "rated", "hh", "prompts", "text",
)  # fmt: skip
UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
format_option = click.option(
    "--format", "form", type=click.Choice(FORMAT_NAMES), default="auto", show_default=True, help="Form of the rows."
)


@click.group("data")
def data_group() -> None:
    """Check data files, register them, and look at what a model would be trained on."""


@data_group.command("add")
@click.argument("file")
@click.option("--name", required=True, help="Name in the registry.")
@format_option
@click.option("--test", help="A file of held-out rows, instead of a fraction.")
@click.option(
    "--test-fraction", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share of the rows held out."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Decides which rows are held out."
)
@as_json_option
def add_command(
    file: str, name: str, form: str, test: str | None, test_fraction: float, seed: int, as_json: bool
) -> None:
    """Check FILE, split it and keep it in the registry under a name.

    Example: align data add answers.jsonl --name answers
    """
    import tempfile

    from align.data.prepare import prepare, source_key, write_prepared
    from align.registry.references import check_name
    from align.registry.store import Registry

    settings = _settings(path=file, format=form, test=test, test_fraction=test_fraction)
    data, here = {check_name(name): settings}, Path()
    key = source_key(name, data, folder=here, seed=seed)
    prepared = prepare(name, data, folder=here, seed=seed)
    registry = Registry.open()
    with tempfile.TemporaryDirectory(prefix="data-", dir=registry.home) as aside:
        write_prepared(prepared, Path(aside) / "data")
        record = registry.add_data(name, key, Path(aside) / "data", prepared.report.as_dict())
    if as_json:
        _print_json(record.as_dict())
        return
    report = prepared.report
    click.echo(
        f"{name} {record.id[:12]}: {report.train_rows} rows to train on, {report.test_rows} held out ({report.format})"
    )
    for warning in report.warnings:
        click.echo(f"  {_printable(warning)}")


@data_group.command("list")
@limit_option
@as_json_option
def list_command(limit: int | None, as_json: bool) -> None:
    """List the data sets of the registry, newest first."""
    from align.registry.store import Registry

    registry = Registry.open(create=False)
    if as_json:
        print_json_rows(record.as_dict() for record in registry.each_data(limit))
        return
    records = registry.all_data(limit or TABLE_ROWS + 1)
    if not records:
        click.echo("no data sets yet; `align data add FILE --name NAME` and every run add some")
        return
    figures = ("kind", "format", "train_rows", "test_rows")
    rows = [
        [record.name, record.id[:12], *(str(record.info.get(figure, "")) for figure in figures), record.created[:16]]
        for record in records[: limit or TABLE_ROWS]
    ]
    _print_table(("name", "id", "kind", "format", "train", "held out", "created"), rows)
    if note := more_note(len(records), limit, "data sets"):
        click.echo(note)


@data_group.command("show")
@click.argument("name")
@click.option("--rows", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows.")
@click.option("--test", "held_out", is_flag=True, help="Show held-out rows instead of those for training.")
@click.option("--tokens", is_flag=True, help="Show which tokens are trained; needs --model.")
@click.option("--model", help="Model folder, or checkpoint of the registry, whose tokenizer is used.")
@click.option(
    "--train-on", type=click.Choice(["assistant", "last", "all"]), default="assistant", show_default=True,
    help="As in the recipe.",
)  # fmt: skip
@as_json_option
def show_command(
    name: str, rows: int, held_out: bool, tokens: bool, model: str | None, train_on: str, as_json: bool
) -> None:
    """Show rows of the data set NAME (a name or an id of the registry), or exactly which of their tokens are trained."""
    from align.data.prepare import read_prepared
    from align.registry.store import Registry

    if tokens and model is None:
        raise click.UsageError("--tokens needs --model: the tokenizer decides what the tokens are")
    registry = Registry.open(create=False)
    record = registry.data(name)
    registry.check_unchanged(record)
    prepared = read_prepared(record.path)
    examples = (prepared.test if held_out else prepared.train)[:rows]
    if tokens:
        _show_tokens(list(_token_spans(examples, str(model), train_on)), as_json)
    elif as_json:
        _print_json(record.as_dict() | {"rows": [example.row() for example in examples]})
    else:
        _show_rows(examples)


@data_group.command("check")
@click.argument("file")
@format_option
@click.option("--strict", is_flag=True, help="Fail (exit 3) on duplicates and on pairs of equal answers, too.")
@as_json_option
@click.pass_context
def check_command(context: click.Context, file: str, form: str, strict: bool, as_json: bool) -> None:
    """Report on FILE: form, rows, lengths, repeats, and every bad row with its line. Exit code 2 if it cannot be used."""
    from align.data.inspection import inspect
    from align.errors import CheckFailed

    report = inspect(_settings(path=file, format=form), Path())
    if as_json:
        _print_json(report.as_dict())
    else:
        _show_report(report)
    if not report.usable:
        context.exit(2)
    if strict and (report.duplicates or report.equal_pairs or report.bad_rows):
        raise CheckFailed(
            f"{report.path}: {report.duplicates} duplicates, {report.equal_pairs} equal pairs, "
            f"{len(report.bad_rows)} bad rows"
        )


# Tokens --------------------------------------------------------------------------------------------------------------

UNLIMITED_TOKENS = 10**9  # nothing is cut or dropped for the eye


def _token_spans(examples: Sequence[Example], model: str, train_on: str) -> Iterator[Spans]:
    """The text of each row as the model sees it, in pieces that are trained and pieces that are not."""
    from align.chat.encoder import Encoder
    from align.chat.templates import prepare_tokenizer
    from align.models.folders import load_tokenizer
    from align.models.source import source_of

    tokenizer = load_tokenizer(source_of(_model_folder(model)))
    prepare_tokenizer(tokenizer, None)
    encoder = Encoder(tokenizer, max_length=UNLIMITED_TOKENS, train_on=train_on)  # type: ignore[arg-type]
    for example in examples:
        for ids, trained in _encoded(encoder, example):
            marked = groupby(zip(ids, trained), key=lambda token: token[1])
            yield [(tokenizer.decode([token for token, _ in span]), flag) for flag, span in marked]


def _encoded(encoder: Any, example: Example) -> Iterator[tuple[list[int], list[bool]]]:
    from align.data.examples import Conversation, Document, Preference, Prompt

    if isinstance(example, Prompt):
        ids = encoder.prompt(example.messages)
        yield ids, [False] * len(ids)
        return
    if isinstance(example, Conversation):
        rows = [encoder.conversation(example)]
    elif isinstance(example, Document):
        rows = encoder.documents(example)
    elif isinstance(example, Preference):
        rows = [encoder.reply(example.prompt, side) for side in (example.chosen, example.rejected)]
    else:
        rows = [encoder.rated(example)]
    yield from ((row.ids, row.trained) for row in rows)


def _model_folder(model: str) -> Path | str:
    """A folder or hub id as it is; a checkpoint's folder by its name."""
    from align.registry.store import Registry

    if Path(model).exists():
        return model
    registry = Registry.open(create=False)
    known = registry.newest_checkpoint(model.partition("@")[0]) is not None
    return registry.checkpoint(model).path if known or "/" not in model else model


def _show_tokens(rows: Sequence[Spans], as_json: bool) -> None:
    """Trained text in green, or as [[text]] where there are no colours."""
    if as_json:
        _print_json([[{"text": text, "trained": trained} for text, trained in spans] for spans in rows])
        return
    coloured = sys.stdout.isatty()
    for spans in rows:
        pieces = ((_printable(text), trained) for text, trained in spans)
        if coloured:
            click.echo("".join(click.style(text, fg="green", bold=True) if on else text for text, on in pieces))
        else:
            click.echo("".join(f"[[{text}]]" if on else text for text, on in pieces))
        click.echo()


# Output --------------------------------------------------------------------------------------------------------------


def _settings(path: str, **values: Any) -> DataSettings:
    from pydantic import ValidationError

    from align.errors import AlignError
    from align.recipe.settings import DataSettings

    try:
        return DataSettings(path=path, **values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise AlignError(f"{option} {first['input']}: {first['msg'].lower()}", "See `align data --help`.") from None


def _show_rows(examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples, start=1):
        click.secho(f"row {number} ({example.kind})", bold=True)
        for field, value in example.row().items():
            turns = value if isinstance(value, list) else [value]
            for turn in turns:
                label, text = (
                    (f"{field}, {turn['role']}", turn["content"])
                    if isinstance(turn, dict) and "role" in turn
                    else (field, turn)
                )
                click.echo(f"  {label}: " + _printable(text).replace("\n", "\n    "))


def _show_report(report: FileReport) -> None:
    click.echo(f"{_printable(report.path)}: {report.format} ({', '.join(report.kinds) or 'no good row'})")
    lengths = f"{report.words.median} words in the middle, {report.words.p95} at 95%, {report.words.largest} at most"
    figures = (
        ("rows", report.rows), ("length", lengths), ("duplicates", report.duplicates),
        ("equal pairs", report.equal_pairs), ("ask what an earlier row asks", report.shared_prompts),
        ("bad rows", len(report.bad_rows)),
    )  # fmt: skip
    for label, value in figures:
        click.echo(f"  {label}: {value}")
    for problem in report.bad_rows:
        click.echo(_printable(problem), err=True)
    if not report.usable:
        click.echo("Error: this file cannot be used as it is; mend or remove the rows above.", err=True)
    elif report.bad_rows:
        click.echo("Rows like these are expected in this format; they are dropped and counted.", err=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))  # ASCII only, so that nothing in the data acts on a terminal


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _printable(text: object) -> str:
    """Text from data with everything that acts on a terminal or turns its reading direction escaped."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
