"""From the examples of a stage to its encoded rows: the tokenizer, the encoder, the longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.chat.bulk import encode_rows
from align.chat.encoder import Encoder
from align.chat.stored import StoredRows
from align.chat.templates import check_template, prepare_tokenizer, template_sha256
from align.data.examples import Example
from align.errors import AlignError
from align.models.folders import load_tokenizer, model_config
from align.models.source import Source
from align.progress import Progress
from align.recipe.settings import TrainingSettings

LONGEST_ROW = 2048  # tokens; max_length where the recipe gives none and the model could take more


@dataclass(frozen=True)
class Desk:
    """Tokenizer and encoder of one stage."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    max_length: int
    context: int
    data: str
    kept: Path | None = None

    @classmethod
    def open(cls, settings: TrainingSettings, parent: Source, template: str | None, kept: Path | None = None) -> Desk:
        """Tokenizer of the parent, with our template where it has none, and an encoder for these settings.

        kept: folder in which encoded rows are kept by content; None: they are not.
        Raises AlignError when the template does not hold what it must, or max_length is beyond the model's context.
        """
        tokenizer = load_tokenizer(parent)
        prepare_tokenizer(tokenizer, template)
        check_template(tokenizer)
        context = context_of(parent)
        longest = _longest_row(settings, context)
        encoder = Encoder(
            tokenizer,
            max_length=longest,
            too_long=settings.too_long,
            cut_prompt=settings.cut_prompt,
            train_on=getattr(settings, "train_on", "assistant"),
        )
        return cls(tokenizer, encoder, longest, context, settings.data, kept)

    @property
    def template_sha256(self) -> str:
        """Hash of the template that every row goes through."""
        return template_sha256(self.tokenizer)

    def rows(self, examples: Sequence[Example], what: str, progress: Progress | None = None) -> StoredRows:
        """Encoded rows, without those that the length policy drops. Raises AlignError when none of them is left."""
        try:
            found = encode_rows(self.encoder, examples, self.kept, progress or Progress())
        except AlignError as error:
            error.message = f"data set '{self.data}' ({what} rows): {error.message}"
            raise
        if examples and not found:
            reasons = _reasons(self.encoder.lengths.as_dict())
            raise AlignError(
                f"data set '{self.data}': none of the {len(examples)} {what} rows is left: {reasons}",
                f"Raise max_length (now {self.max_length}), or set too_long: cut or cut_prompt: true.",
            )
        return found


def context_of(parent: Source) -> int:
    """Most tokens that the model can take; LONGEST_ROW where its config does not say."""
    config = model_config(parent).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or LONGEST_ROW)


def _longest_row(settings: TrainingSettings, context: int) -> int:
    if settings.max_length is None:
        return min(context, LONGEST_ROW)
    if settings.max_length > context:
        raise AlignError(
            f"max_length is {settings.max_length}, and the model's context is {context} tokens",
            f"Set max_length to {context} or less.",
        )
    return settings.max_length


def _reasons(counts: dict[str, int]) -> str:
    names = {"dropped": "too long", "without_answer": "without a token to train", "equal_pairs": "equal pairs"}
    return (
        ", ".join(f"{counts[name]} {words}" for name, words in names.items() if counts.get(name)) or "nothing to train"
    )
