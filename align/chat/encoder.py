"""Examples -> token ids and the mask of trained tokens: the one `encode` of training, scoring, PPO prompts and chat.

A row is the prompt that `Encoder.prompt` gives to generation, followed by what the model has to write; it ends with the
last stop token. The length policy stands here; text is made by rendering.py, ids by tokens.py, and the template of a
tokenizer is chosen by templates.py (its functions, and the rows of encoded.py, are offered here too).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from align.chat.encoded import Encoded, EncodedPair, LengthReport
from align.chat.rendering import Rendered, Renderer, Tools
from align.chat.tokens import PieceTokenizer
from align.data.examples import Conversation, Document, Messages, Preference, Rated
from align.errors import AlignError

_TRAINING_TEMPLATE = "Set `template:` to a version of the template for training, where the prompt begins the row."
TooLong = Literal["drop", "cut", "error"]
TrainOn = Literal["assistant", "last", "all"]


class Encoder:
    """Encodes the rows of one data set under one length policy; `lengths` counts what became of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        too_long: TooLong = "drop",
        cut_prompt: bool = False,
        train_on: TrainOn = "assistant",
    ) -> None:
        """max_length: longest row in tokens. too_long: what happens to longer ones. cut_prompt: cut prompts first."""
        if max_length < 2:
            raise AlignError(f"max_length is {max_length}, and a row needs 2 tokens to train one", "Raise max_length.")
        self.tokenizer = tokenizer
        self._pieces = PieceTokenizer(tokenizer)
        self.max_length = max_length
        self._too_long = too_long
        self._cut_prompt = cut_prompt
        self._train_on = train_on
        self.policy: dict[str, Any] = {
            "max_length": max_length, "too_long": too_long, "cut_prompt": cut_prompt, "train_on": train_on
        }  # fmt: skip
        self.lengths = LengthReport()

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer)

    def conversation(self, conversation: Conversation) -> Encoded | None:
        """A row whose assistant turns are trained as `train_on` says; None: left out by the length policy."""
        self.lengths.rows += 1
        rendered = self._renderer.conversation(conversation.messages, conversation.tools)
        self.lengths.untrainable_turns += rendered.untrainable
        row = self._encode(rendered, rendered.turns[-1].message if self._train_on == "last" else 0)
        rows = self._fit([row], row.trained.index(True), every=self._train_on == "all")
        return rows[0] if rows else None

    def documents(self, document: Document) -> list[Encoded]:
        """BOS, the text and EOS, every token trained; in chunks of `max_length` where that is exceeded.

        A chunk begins with the last token of the one before as context, so that each token is a label exactly once.
        """
        self.lengths.rows += 1
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [token for token in (bos, *self._pieces.literal(document.text), eos) if token is not None]
        starts = range(0, max(len(ids) - 1, 1), self.max_length - 1)
        chunks = [ids[start : start + self.max_length] for start in starts]
        return self._kept([Encoded(chunk, [True] * len(chunk)) for chunk in chunks])

    def preference(self, preference: Preference) -> EncodedPair | None:
        """Both answers behind one prompt; None: left out by the length policy, or nothing tells the answers apart."""
        self.lengths.rows += 1
        chosen = self.reply(preference.prompt, preference.chosen)
        rejected = self.reply(preference.prompt, preference.rejected)
        prompt = chosen.trained.index(True)
        if rejected.trained.index(True) != prompt or rejected.ids[:prompt] != chosen.ids[:prompt]:
            raise AlignError(
                "the chat template shows the prompt differently before the two answers", _TRAINING_TEMPLATE
            )
        rows = self._fit([chosen, rejected], prompt)
        if rows is None:
            return None
        return EncodedPair(rows[0], rows[1], rows[0].trained.index(True), preference.margin, preference.probability)

    def rated(self, rated: Rated) -> Encoded | None:
        """The completion behind its prompt; None: left out by the length policy."""
        self.lengths.rows += 1
        row = self.reply(rated.prompt, rated.completion)
        rows = self._fit([row], row.trained.index(True))
        return rows[0] if rows else None

    def prompt(self, messages: Messages, tools: Tools = ()) -> list[int]:
        """What generation is given to write the next assistant turn; rows begin with exactly these ids. Never cut."""
        return self._encode(self._renderer.prompt(messages, tools), first=0).ids

    def cut_prompt(self, ids: list[int], room: int) -> list[int]:
        """A prompt's ids without as many at its left as `room` asks for; BOS and the end stay."""
        start = int(ids[0] == self.tokenizer.bos_token_id)
        return ids[:start] + ids[start + max(len(ids) - room, 0) :]

    def reply(self, prompt: Messages, reply: Messages, tools: Tools = ()) -> Encoded:
        """The prompt's ids and the reply's, of which the assistant's turns are trained. Never cut, never counted."""
        rendered = self._renderer.conversation((*prompt, *reply), tools)
        row = self._encode(rendered, first=len(prompt))
        if True not in row.trained:
            raise AlignError("a reply needs an assistant turn", "Mend or drop the row.")
        return row

    def _encode(self, rendered: Rendered, first: int) -> Encoded:
        """Ids of the text, with the assistant turns from message `first` on trained."""
        pieces: list[str] = []
        trained: list[bool] = []
        place = 0
        for turn in rendered.turns:
            pieces += [rendered.text[place : turn.start], rendered.text[turn.start : turn.end]]
            trained += [False, turn.message >= first]
            place = turn.end
        tokens = self._pieces.ids([*pieces, rendered.text[place:]])
        mask = [flag for flag, ids in zip([*trained, False], tokens, strict=True) for _ in ids]
        return Encoded([token for ids in tokens for token in ids], mask)

    def _fit(self, rows: list[Encoded], prompt: int, *, every: bool = False) -> list[Encoded] | None:
        """One row, or the two of a pair, within `max_length`; None: left out, and counted as what.

        prompt: number of tokens before the first trained one. every: train all tokens of what is kept.
        """
        count = self.lengths
        longest = max(len(row.ids) for row in rows)
        shorter = self._without_prompt(rows, prompt, longest - self.max_length) if self._cut_prompt else rows
        cut = any(len(row.ids) > self.max_length for row in shorter)
        if cut and self._too_long == "error":
            raise self._too_long_error(longest)
        if cut and self._too_long == "drop":
            count.dropped += 1
            return None
        kept = [Encoded(row.ids[: self.max_length], row.trained[: self.max_length]) for row in shorter]
        if not all(row.labels for row in kept):
            count.without_answer += 1
            return None
        if len(kept) == 2 and kept[0].ids == kept[1].ids:
            count.equal_pairs += 1
            return None
        count.cut += cut
        count.cut_without_stop += any(map(self._loses_stop, shorter))
        count.cut_prompts += len(shorter[0].ids) < len(rows[0].ids)
        return self._kept([Encoded(row.ids, [True] * len(row.ids)) for row in kept] if every else kept)

    def _without_prompt(self, rows: list[Encoded], prompt: int, excess: int) -> list[Encoded]:
        """The rows with up to `excess` tokens less at the left of their prompt; BOS and the last token of it stay."""
        start = int(rows[0].ids[0] == self.tokenizer.bos_token_id)
        end = start + max(min(excess, prompt - start - 1), 0)
        return [Encoded(row.ids[:start] + row.ids[end:], row.trained[:start] + row.trained[end:]) for row in rows]

    def _loses_stop(self, row: Encoded) -> bool:
        """Whether a cut at `max_length` falls inside a trained turn."""
        return len(row.ids) > self.max_length and row.trained[self.max_length - 1] and row.trained[self.max_length]

    def _kept(self, rows: list[Encoded]) -> list[Encoded]:
        self.lengths.lengths += [len(row.ids) for row in rows]
        self.lengths.trained_tokens += sum(row.labels for row in rows)
        return rows

    def _too_long_error(self, longest: int) -> AlignError:
        return AlignError(
            f"row {self.lengths.rows} has {longest} tokens, and max_length is {self.max_length}",
            "Raise max_length, shorten the row, or set `too_long: drop` or `cut`.",
        )
