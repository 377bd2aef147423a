"""What a tokenizer needs before it can chat: a template, a stop token, a padding token; and the proof that they work.

Rendering is `rendering.py`'s and tokens are `tokens.py`'s; this file decides which template a tokenizer has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from align.chat.rendering import Renderer, own_template
from align.chat.tokens import PieceTokenizer
from align.data.examples import Message, Messages
from align.errors import AlignError

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
STOP_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
_KNOWN_PADS = ("<pad>", "[PAD]", PAD_TOKEN, "<|finetune_right_pad_id|>")
_MARK = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_\w+>"
)  # shapes in use for control tokens

_ASK, _ANSWER, _AGAIN, _LAST = "probe question", "probe answer", "another probe", "final probe"
_PROBES: tuple[Messages, ...] = (
    (Message("user", _ASK), Message("assistant", _ANSWER)),
    (Message("user", _ASK), Message("assistant", _ANSWER), Message("user", _AGAIN), Message("assistant", _LAST)),
)
_SYSTEM_PROBE: Messages = (Message("system", "probe manners"), *_PROBES[0])


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> int:
    """Give the tokenizer all that chats and padding need; returns how many tokens were added to it.

    template: Jinja text that replaces the tokenizer's own; None: its own, else ours. Marks like <|user|> in a template
    that is given become special tokens where they are none. A given template, or ours, also decides `eos_token`: it is
    the token that ends the assistant's turn, unless the template uses eos_token for something else (ours ends the turn
    with the eos_token that there is, else with <|end|>).
    A padding token that is absent or equal to the stop token is replaced, so that no other tool masks the stop token.
    """
    before = len(tokenizer)
    if template is not None and not template.strip():
        raise AlignError("the chat template is empty", "Write it into its file, or leave `template:` out to use ours.")
    if template is None and not tokenizer.chat_template:
        _give_own_template(tokenizer)
    elif template is not None:
        _give_template(tokenizer, template)
    _give_distinct_pad(tokenizer)
    return len(tokenizer) - before


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the template's text (of the JSON of all of them where there are several), in hex."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation ends: the template's stop token first, then eos_token where that is another."""
    tokens = [Renderer(tokenizer).stop] if tokenizer.chat_template else []
    if tokenizer.eos_token is not None:
        tokens.append(tokenizer.eos_token)
    return list(dict.fromkeys(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens))


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render and tokenise short conversations; raises AlignError unless the template can be trained on.

    Every content appears once and in order, the last assistant turn is what its prompt asks for and ends with one
    stop token, and BOS stands at most once, first. A system turn is only tried: some templates refuse it.
    """
    renderer = Renderer(tokenizer)
    for probe in (*_PROBES, *_system_probe(renderer)):
        _check_contents(renderer.conversation(probe).text, probe)
        _check_contents(renderer.prompt(probe[:-1]).text, probe[:-1])
        _check_ids(tokenizer, renderer, probe)


def _give_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": STOP_TOKEN})
    _add_special(tokenizer, ROLE_TOKENS)
    tokenizer.chat_template = own_template()


def _give_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    _add_special(tokenizer, dict.fromkeys(_MARK.findall(template)))
    tokenizer.chat_template = template
    renderer, eos = Renderer(tokenizer), tokenizer.eos_token
    before = renderer.conversation(_PROBES[1]).text
    tokenizer.eos_token = renderer.stop
    if Renderer(tokenizer).conversation(_PROBES[1]).text != before:  # the template writes eos_token elsewhere too
        tokenizer.eos_token = eos


def _give_distinct_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    stop = stop_token_ids(tokenizer)[0]
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != stop:
        return
    vocabulary = tokenizer.get_vocab()
    known = next((token for token in _KNOWN_PADS if token in vocabulary), tokenizer.unk_token)
    usable = known is not None and vocabulary[known] not in (stop, tokenizer.bos_token_id)
    tokenizer.add_special_tokens({"pad_token": known if usable else PAD_TOKEN})


def _add_special(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str] | dict[str, None]) -> None:
    special = set(tokenizer.all_special_tokens)
    new = [token for token in tokens if token not in special]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)


def _system_probe(renderer: Renderer) -> list[Messages]:
    try:
        renderer.prompt(_SYSTEM_PROBE[:-1])
    except AlignError:
        return []
    return [_SYSTEM_PROBE]


def _check_contents(text: str, messages: Messages) -> None:
    place = 0
    for message in messages:
        times = text.count(message.content)
        place = text.find(message.content, place)
        if times != 1 or place < 0:
            raise AlignError(
                f"the chat template shows the {message.role}'s text {times} times or out of order (it must once): {text!r}",
                "Look for a misspelt name in the template: Jinja renders what it does not know as nothing.",
            )


def _check_ids(tokenizer: PreTrainedTokenizerBase, renderer: Renderer, probe: Messages) -> None:
    rendered = renderer.conversation(probe)
    turn = rendered.turns[-1]
    head, reply = PieceTokenizer(tokenizer).ids([rendered.text[: turn.start], rendered.text[turn.start :]])
    stop = tokenizer.convert_tokens_to_ids(renderer.stop)
    if reply.count(stop) != 1 or reply[-1] != stop:
        raise AlignError(
            f"the assistant's turn must end with one {renderer.stop!r}, but is {rendered.text[turn.start :]!r}",
            "Write the stop token once, after the assistant's content.",
        )
    bos = tokenizer.bos_token_id
    if bos is not None and bos != stop and bos in (*head[1:], *reply):
        raise AlignError(
            f"the chat template writes {tokenizer.bos_token!r} more than once or not first: {rendered.text!r}",
            "Write {{ bos_token }} once, at the beginning, or not at all.",
        )
