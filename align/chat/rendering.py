"""Messages -> text by the tokenizer's chat template, with the place of every assistant turn in it.

The only place where a chat template is applied, by transformers' sandboxed renderer. An assistant turn is found by
rendering what comes before it (as the prompt that asks for it) and up to it, so nothing is known here of any
template's markers: what stands between the two is exactly what the model has to write. Tokens are `tokens.py`'s.

Some templates show an old turn otherwise than they asked for it (they drop its reasoning, or end only the last turn
with the stop token). Such a turn cannot be trained inside a longer conversation and is reported as not trainable;
the last turn always is, or the template is refused.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from align.chat.guard import guard
from align.chat.tokens import LITERAL_END, LITERAL_START
from align.data.examples import Message, Messages
from align.errors import AlignError

Tools = Sequence[Mapping[str, Any]]

KEPT = 16  # texts: those of a pair whose prompt has seven answers
_PROBE: Messages = (Message("user", "question"), Message("assistant", "answer"))


@cache
def own_template() -> str:
    """Our chat template, given to tokenizers that have none."""
    return resources.files("align.chat").joinpath("template.jinja").read_text(encoding="utf-8").strip()


@dataclass(frozen=True, slots=True)
class Turn:
    """`text[start:end]` is what the model has to write as `messages[message]`: content and stop token."""

    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation. untrainable: number of assistant turns that the text shows otherwise than asked for."""

    text: str
    turns: tuple[Turn, ...]
    untrainable: int


class Renderer:
    """Applies the chat template of one tokenizer, which stays as it is. `stop`: special token that ends an assistant turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises AlignError for a template that is absent, too costly, broken, or never ends the assistant's turn."""
        if not tokenizer.chat_template:
            raise AlignError("the tokenizer has no chat template", "Call prepare_tokenizer, which gives it ours.")
        self._tokenizer = tokenizer
        for template in _texts(tokenizer.chat_template):
            if template != own_template():
                guard(template)
        added = tokenizer.added_tokens_decoder.values()
        self._special = sorted((token.content for token in added), key=len, reverse=True)
        control = [token.content for token in added if token.special]
        self._control = re.compile("|".join(map(re.escape, [LITERAL_START, LITERAL_END, *control])))
        self._latest: deque[tuple[Messages, bool, Tools, str]] = deque(maxlen=KEPT)
        self.stop = self._find_stop()

    def prompt(self, messages: Messages, tools: Tools = ()) -> Rendered:
        """What the model is given to write the next assistant turn; its turns are those of the history."""
        return self._with_turns(self._text(messages, tools, ask=True), messages, tools)

    def conversation(self, messages: Messages, tools: Tools = ()) -> Rendered:
        """A whole conversation up to its last assistant turn; what the template writes after that is left out.

        Raises AlignError when there is no assistant turn, or the last one is not what the model is asked for.
        """
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        if last <= 0:
            raise AlignError(
                "a conversation needs an assistant turn with a turn before it, which asks for it",
                "Mend or drop the row.",
            )
        messages = messages[: last + 1]
        rendered = self._with_turns(self._text(messages, tools, ask=False), messages, tools)
        if not rendered.turns or rendered.turns[-1].message != last:
            raise self._not_asked_for(messages, tools)
        return Rendered(rendered.text[: rendered.turns[-1].end], rendered.turns, rendered.untrainable)

    def _with_turns(self, text: str, messages: Messages, tools: Tools) -> Rendered:
        turns: list[Turn] = []
        untrainable = 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            turn = self._turn(text, index, messages, tools)
            if turn is None:
                untrainable += 1
            else:
                turns.append(turn)
        return Rendered(text, tuple(turns), untrainable)

    def _turn(self, text: str, index: int, messages: Messages, tools: Tools) -> Turn | None:
        """The turn of messages[index], or None where `text` does not show it as it was asked for."""
        if index == 0:
            return None  # nothing asked for it
        before = self._text(messages[:index], tools, ask=True)
        through = self._text(messages[: index + 1], tools, ask=False)
        end = through.rfind(self.stop) + len(self.stop)
        if end <= len(before) or not (through.startswith(before) and text.startswith(through[:end])):
            return None
        return Turn(index, len(before), end)

    def _text(self, messages: Messages, tools: Tools, *, ask: bool) -> str:
        """The latest texts are kept: both answers of a pair have one prompt, and a whole conversation is what it is up to
        its last turn."""
        for known_messages, asks, known_tools, text in self._latest:
            if asks == ask and known_messages == messages and known_tools == tools:
                return text
        text = self._rendered(messages, tools, ask=ask)
        self._latest.appendleft((messages, ask, tools, text))
        return text

    def _rendered(self, messages: Messages, tools: Tools, *, ask: bool) -> str:
        if not messages:
            raise AlignError("there is no message to render", "A conversation needs at least one turn.")
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [self._literal(message.row()) for message in messages],
                    tools=[self._literal(tool) for tool in tools] or None,
                    add_generation_prompt=ask,
                    tokenize=False,
                )
            )
        except TemplateSyntaxError as error:
            raise AlignError(
                f"the chat template is no Jinja, at its line {error.lineno}: {error.message}",
                "Mend the template, or set `template:` in the recipe to another.",
            ) from error
        except Exception as error:  # a template can raise whatever an expression in it can
            roles = ", ".join(message.role for message in messages)
            raise AlignError(
                f"the chat template cannot render a conversation with the roles {roles}: {error}",
                "Mend the rows, or set `template:` in the recipe to a template that knows these roles.",
            ) from error

    def _literal(self, value: Any) -> Any:
        """`value` with every control token inside its strings marked as plain text, so that data forges no turn."""
        if isinstance(value, str):
            return self._control.sub(_mark, value) if self._control.search(value) else value
        if isinstance(value, Mapping):
            return {key: self._literal(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._literal(item) for item in value]
        return value

    def _find_stop(self) -> str:
        text, content = self._text(_PROBE, (), ask=False), _PROBE[-1].content
        if content not in text:
            raise AlignError(
                f"the chat template loses the assistant's text: {text!r}",
                "It may want another form of content than plain text; set `template:` to one for text.",
            )
        after = text[text.rfind(content) + len(content) :]
        found = re.search("|".join(map(re.escape, self._special)), after) if self._special else None
        if found is None:
            raise AlignError(
                f"the chat template ends the assistant's turn with {after!r}, which holds no special token of this "
                "tokenizer: the model would never learn to stop",
                "Add {{ eos_token }} after the assistant's content, or leave `template:` out to use ours.",
            )
        return found.group()

    def _not_asked_for(self, messages: Messages, tools: Tools) -> AlignError:
        asked = self._text(messages[:-1], tools, ask=True)[-60:]
        shown = self._text(messages, tools, ask=False)[-60:]
        return AlignError(
            "the chat template asks for the last assistant turn in one way and shows it in another, so what is trained "
            f"would not be what is generated: it asks with ...{asked!r} and shows ...{shown!r}",
            "Set `template:` to a version of the template for training, where the prompt is the beginning of the row.",
        )


def _mark(match: re.Match[str]) -> str:
    token = match.group()
    return "" if token in (LITERAL_START, LITERAL_END) else f"{LITERAL_START}{token}{LITERAL_END}"


def _texts(chat_template: str | dict[str, str]) -> list[str]:
    return [chat_template] if isinstance(chat_template, str) else list(chat_template.values())
