"""`align merge`: an adapter into its base as one plain folder, with the measured proof that it is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from align.cli.listing import json_option, print_json
from align.errors import AlignError, CheckFailed

if TYPE_CHECKING:
    from align.data.examples import Example
    from align.models.merging import MergeVerdict

LONGEST_ROW = 512  # tokens of one text that are compared
MOST_ROWS = 64  # texts that are compared
BUILT_IN_TEXTS = (
    "Once upon a time there was a small boat that wanted to see the sea.",
    "The capital of France is Paris. The capital of Japan is Tokyo. The capital of Kenya is Nairobi.",
    "Question: What is 17 plus 25?\nAnswer: 17 plus 25 is 42.",
    "Write a polite e-mail to a colleague who has missed a deadline, and offer to help.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain.",
    "I cannot help with that, but I can explain how to stay safe and whom to ask.",
    "First mix the flour and the sugar, then add two eggs, and bake it for half an hour.",
)


@click.command(
    "merge", epilog="CHECKPOINT is a name of the registry (recipe/stage, a tag, an id) or an adapter folder."
)
@click.argument("checkpoint")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for the merged model.")
@click.option(
    "--into",
    type=click.Choice(["auto", "original", "dequantized"]),
    default="auto",
    show_default=True,
    help="Base to merge into; auto: the one that the adapter was trained on, dequantized if it was quantized.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0, min_open=True),
    default=0.05,
    show_default=True,
    help="Most mean KL, in nats per token, from the adapter on its base to the merged model.",
)
@click.option("--data", help="Text to measure on: a file, or a data set of the registry; else the checkpoint's own.")
@json_option
def merge_command(
    checkpoint: str,
    out: Path,
    into: Literal["auto", "original", "dequantized"],
    max_kl: float,
    data: str | None,
    as_json: bool,
) -> None:
    """Merge an adapter into its base and prove it: the folder is read back and compared with the adapter.

    Ends with exit code 3 when they differ by more than --max-kl; the folder stays, to be looked at.
    """
    from align.models.folders import load_tokenizer
    from align.models.merging import merge
    from align.use.references import resolve

    _refuse_used(out)
    source = resolve(checkpoint)
    rows, text = _rows_to_compare(load_tokenizer(source), checkpoint, data)
    verdict = merge(source, out, rows=rows, into=into, max_kl=max_kl)
    if as_json:
        print_json({**verdict.as_dict(), "path": str(out), "text": text})
    else:
        click.echo(_in_words(verdict, out, text))
    if not verdict.holds:
        raise CheckFailed(
            f"the merged model is not the adapter: {verdict}",
            "Use --into auto, or raise --max-kl if this is near enough. The folder was kept.",
        )


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AlignError(f"{out}: exists and is not empty", "Name a new folder with --out.")


def _in_words(verdict: MergeVerdict, out: Path, text: str) -> str:
    size = (
        "the same model up to rounding" if verdict.kl < 1e-4 else "close to the adapter" if verdict.holds else "not it"
    )
    return "\n".join(
        (
            f"merged into the {verdict.into} base: {verdict.why}",
            f"read back from {out} and compared on {verdict.compared} places of {text}: {size}",
            f"  mean KL          {verdict.kl:.3g} nats (bound {verdict.max_kl:g})",
            f"  top-1 agreement  {verdict.top1_agreement:.2%}",
        )
    )


def _rows_to_compare(tokenizer: Any, checkpoint: str, data: str | None) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and in words where they come from."""
    examples, name = _held_out(checkpoint) if data is None else (_given(data), data)
    rows = [ids for example in examples[:MOST_ROWS] if (ids := _encoded(tokenizer, example))]
    if rows or data is not None:
        return rows, name
    return [tokenizer(text).input_ids[:LONGEST_ROW] for text in BUILT_IN_TEXTS], "the built-in texts"


def _given(data: str) -> list[Example]:
    from align.use.rows import read_file_or_data_set

    return read_file_or_data_set(data)


def _held_out(checkpoint: str) -> tuple[list[Example], str]:
    """Held-out rows of the data that a registered checkpoint was trained on; none for a plain folder."""
    from align.data.prepared import read_prepared
    from align.registry import Registry

    if Path(checkpoint).is_dir() or not (registry := Registry.open(create=False)).knows(checkpoint):
        return [], ""
    for use in registry.checkpoint(checkpoint).data:
        record = registry.data(use.id)
        registry.check_unchanged(record)
        if rows := read_prepared(record.path).test[:MOST_ROWS]:
            return list(rows), f"the held-out rows of {record.name}"
    return [], ""


def _encoded(tokenizer: Any, example: Example) -> list[int]:
    """The tokens of an example as training sees them; of its bare text where the tokenizer has no template."""
    from align.chat.encoder import Encoder
    from align.data.examples import Conversation, Document, Preference, Prompt

    if isinstance(example, Document):
        return list(tokenizer(example.text).input_ids[:LONGEST_ROW])
    if tokenizer.chat_template is None:
        return list(tokenizer(_bare_text(example)).input_ids[:LONGEST_ROW])
    encoder = Encoder(tokenizer, max_length=LONGEST_ROW, too_long="cut", train_on="all")
    if isinstance(example, Conversation):
        row = encoder.conversation(example)
        return row.ids if row else []
    if isinstance(example, Prompt):
        return encoder.prompt(example.messages)[:LONGEST_ROW]
    reply = example.chosen if isinstance(example, Preference) else example.completion
    return encoder.reply(example.prompt, reply).ids[:LONGEST_ROW]


def _bare_text(example: Any) -> str:
    from align.data.examples import prompt_of

    return "\n".join(message.content for message in prompt_of(example))
