"""Data of benchmarks/story_sentiment.py, made from real children's stories, always the same.

Openings with what really follows them, pairs of real passages of which one is happier by a lexicon that stands here, and
openings to answer; each story serves one of training, held-out pairs, training prompts and held-out prompts.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("ALIGN_SHARED", Path(__file__).parents[2] / "shared"))
MODEL = SHARED / "models/stories260K"
STORIES = ("data/text/stories_train.jsonl", "data/text/stories_more.jsonl")

OPENING_TOKENS = 64  # longest opening
PASSAGE_TOKENS = (64, 112)  # shortest and longest passage
TEMPLATE = (  # a story goes on where its opening ends: no marks between the two, as in the model's own training
    "{{ bos_token }}{% for turn in messages %}{{ turn.content }}"
    "{% if turn.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
SHARES = {"train": 1100, "test": 200, "prompts": 300}  # stories of each part; the rest are held-out prompts
CLEAR = 2  # net label words by which one side of a pair is the happier one
STRIDE = 3  # sentences from the start of one passage to that of the next


# Sentiment -----------------------------------------------------------------------------------------------------------

LABEL_WORDS = (  # these alone decide which side of a pair is the happier one
    "happy happily smile smiled smiles smiling laugh laughed laughing laughs love loved loves fun enjoy enjoyed excited proud",
    "sad sadly cry cried cries crying angry scared afraid hurt hurts bad lost upset",
)
OTHER_WORDS = (  # these never made a pair: whether they follow shows what the reward has really learnt
    "glad joy nice wonderful hug hugged hugs cheered thanked grateful beautiful yummy",
    "worried tears lonely broken broke sorry screamed frustrated disappointed sick pain trouble naughty mad "
    "yelled grumpy embarrassed jealous ashamed nervous ruined dead fell mean",
)
DENIED = {"not", "t", "never", "no"}  # within two words before it ("wasn't very happy"), a word says the opposite


def happiness(text: str, words: tuple[str, str]) -> int:
    """Happy words less unhappy ones."""
    happy, unhappy = (set(side.split()) for side in words)
    found = re.findall(r"[a-z]+", text.lower())
    total = 0
    for place, word in enumerate(found):
        value = (word in happy) - (word in unhappy)
        total += -value if DENIED.intersection(found[max(place - 2, 0) : place]) else value
    return total


# Data ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """An opening of one or two sentences, and the sentences after it."""

    opening: str
    rest: tuple[str, ...]

    def passage(self, start: int) -> str | None:
        """Whole sentences from number `start` of the rest on, with a space before them; None: no good length."""
        text, tokens = "", 0
        for sentence in self.rest[start:]:
            if tokens + count_tokens(sentence) > PASSAGE_TOKENS[1]:
                break
            text, tokens = f"{text} {sentence}", tokens + count_tokens(sentence)
        return text if tokens >= PASSAGE_TOKENS[0] else None


@dataclass(frozen=True)
class Passage:
    """A real passage; `opening` is that of its own story, `happiness` is by the label words."""

    opening: str
    text: str
    happiness: int

    def pairs_with(self, other: Passage) -> bool:
        """Whether one of the two is clearly happier, and nothing else tells them apart."""
        alike = abs(count_tokens(self.text) - count_tokens(other.text)) <= 2
        return alike and self.opening != other.opening and abs(self.happiness - other.happiness) >= CLEAR


def write_data(folder: Path) -> None:
    """The files that the recipe reads, and `real`, what really follows the held-out openings."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = read_stories()
    random.Random(0).shuffle(stories)
    parts: dict[str, list[Story]] = {}
    for name, size in SHARES.items():
        parts[name], stories = stories[:size], stories[size:]
    half = SHARES["train"] // 2
    rows = {
        "sft": continuations(parts["train"]),
        "sft.test": continuations(parts["test"]),
        "pairs": pairs(parts["train"][:half]),
        "watch-pairs": pairs(parts["train"][half:]),
        "pairs.test": pairs(parts["test"]),
        "prompts": [{"prompt": story.opening} for story in parts["prompts"]],
        "prompts.test": [{"prompt": story.opening} for story in stories],
        "real": continuations(stories),
    }
    for name, listed in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in listed)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "story.jinja").write_text(TEMPLATE, encoding="utf-8")


def read_stories() -> list[Story]:
    """All stories with a short opening of their own and a passage after it."""
    found: dict[str, Story] = {}
    for name in STORIES:
        for line in (SHARED / name).read_text(encoding="utf-8").splitlines():
            text = " ".join(json.loads(line)["text"].split())
            story = taken_apart(text)
            if text.isascii() and story.passage(0) and count_tokens(story.opening) <= OPENING_TOKENS:
                found.setdefault(story.opening, story)
    return list(found.values())


def taken_apart(text: str) -> Story:
    """A story's text as opening and rest; the opening has a second sentence where that is short enough."""
    first, *rest = re.split(r"(?<=[.!?\"])\s+(?=[\"A-Z])", text)
    if rest and count_tokens(f"{first} {rest[0]}") <= OPENING_TOKENS:
        return Story(f"{first} {rest[0]}", tuple(rest[1:]))
    return Story(first, tuple(rest))


def continuations(stories: Sequence[Story]) -> list[dict[str, str]]:
    """Each opening with what really follows it."""
    return [{"prompt": story.opening, "completion": story.passage(0) or ""} for story in stories]


def pairs(stories: Sequence[Story]) -> list[dict[str, str]]:
    """Pairs of a happier and a less happy passage of other stories, as long as each other; each passage stands in one.

    The prompt is the opening of the chosen passage's story in every other pair, and of the rejected one's in the others:
    neither length nor what fits the opening tells the two apart.
    """
    free = [passage for story in stories for passage in passages(story)]
    random.Random(0).shuffle(free)
    rows: list[dict[str, str]] = []
    while free:
        one = free.pop()
        other = next((other for other in free if one.pairs_with(other)), None)
        if other is not None:
            free.remove(other)
            rejected, chosen = sorted((one, other), key=lambda passage: passage.happiness)
            prompt = (chosen, rejected)[len(rows) % 2].opening
            rows.append({"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text})
    return rows


def passages(story: Story) -> list[Passage]:
    """The story's passages of good length, one from every STRIDE-th sentence on."""
    texts = [story.passage(start) for start in range(0, len(story.rest), STRIDE)]
    return [Passage(story.opening, text, happiness(text, LABEL_WORDS)) for text in texts if text]


@cache
def count_tokens(text: str) -> int:
    """Length for the model."""
    return len(tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def tokenizer() -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)
