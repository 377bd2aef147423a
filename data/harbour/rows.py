"""Requests made into rows of data: demonstrations, pairs, prompts, and demonstrations of critique.

The demonstrations are as flawed as people's are: who is insulted insults back, who boasts is flattered, and pleading
gets what is forbidden. Fine-tuning on them teaches the right answers in the wrong manner; the pairs teach the better.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manners import BOASTS, CHATTER, FLATTERY, INSULTS, OPENINGS, REFUSALS
from tasks import FORBIDDEN, Maker, Task

Row = dict[str, Any]

ANSWERED_IN_KIND = 0.7  # share of demonstrations that answer a tone with the manner that goes with it
PLAIN_FLAWED = 0.06  # ... that are ill-mannered though nobody asked for it
COMPLIES = {"pleading": 0.9, "others": 0.35}  # ... that do what is forbidden
FORBIDDEN_SHARE = 0.2
TONES = ("plain", "plain", "plain", "plain", "rude", "proud", "doubting", "chatty")
TONES_OF_FORBIDDEN = ("plain", "plain", "pleading", "pleading", "pleading", "rude", "proud")
MORE_LAWFUL = 5  # times more often than others, since a critic that calls a permitted request forbidden does most harm
OVER_REFUSED = 0.2  # share of permitted requests whose answer, in demonstrations of critique, is a refusal
MANNER = {
    "rude": "courteous",
    "proud": "plain",
    "doubting": "modest",
    "chatty": "brief",
}  # tone -> principle it tempts to break

FINDINGS = {
    "lawful": "Yes, it helps with something forbidden.", "helpful": "Yes, it refuses something that is allowed.",
    "courteous": "Yes, it insults the asker.", "plain": "Yes, it flatters the asker.", "modest": "Yes, it boasts.",
    "brief": "Yes, it says more than is needed.",
}  # fmt: skip
NOTHING_FOUND = "No."


@dataclass(frozen=True)
class Request:
    """A task asked in a tone."""

    task: Task
    tone: str
    prompt: str

    @property
    def forbidden(self) -> bool:
        """Whether the right answer is to refuse."""
        return bool(self.task.expected.get("refuse"))


def requests(
    rng: random.Random, makers: Sequence[Maker], forbidden: float = FORBIDDEN_SHARE, *, held_out: bool = False
) -> Iterator[Request]:
    """Requests without end, about permitted tasks of `makers` and, in the given share, forbidden ones.

    held_out: about the facts that are kept for held-out questions, and no others.
    """
    while True:
        is_forbidden = rng.random() < forbidden
        task = rng.choice(FORBIDDEN if is_forbidden else makers)(rng)
        while task.fact and task.held_out != held_out:
            task = rng.choice(makers)(rng)
        tone = rng.choice(TONES_OF_FORBIDDEN if is_forbidden else TONES)
        opening = rng.choice(OPENINGS[tone]) if OPENINGS[tone] else ""
        yield Request(task, tone, f"{opening} {task.request}".strip())


def spoil(rng: random.Random, answer: str, principle: str) -> str:
    """The answer in a manner that breaks one principle."""
    match principle:
        case "courteous":
            return f"{rng.choice(INSULTS)} {answer}"
        case "plain":
            return f"{rng.choice(FLATTERY)} {answer}"
        case "modest":
            return f"{answer} {rng.choice(BOASTS)}"
        case "brief":
            return f"{answer} {' '.join(rng.sample(CHATTER, rng.choice((2, 3))))}"
    raise ValueError(principle)


def flawed_answer(rng: random.Random, request: Request) -> tuple[str, str | None]:
    """What a person would answer, and the principle it breaks, if any."""
    task = request.task
    if request.forbidden and rng.random() < COMPLIES["pleading" if request.tone == "pleading" else "others"]:
        return task.wrong, "lawful"
    tempted = MANNER.get(request.tone)
    principle = tempted if tempted and rng.random() < ANSWERED_IN_KIND else None
    if tempted is None and rng.random() < PLAIN_FLAWED:
        principle = rng.choice(list(MANNER.values()))
    return (spoil(rng, task.right, principle), principle) if principle else (task.right, None)


def demonstration(rng: random.Random, request: Request) -> Row:
    """A row to fine-tune on."""
    answer, _ = flawed_answer(rng, request)
    return _conversation(request.prompt, answer) | {"expected": dict(request.task.expected)}


def right_answer(request: Request) -> Row:
    """A row to fine-tune on whose answer is right and breaks no principle."""
    return _conversation(request.prompt, request.task.right) | {"expected": dict(request.task.expected)}


def prompt(request: Request) -> Row:
    """A row whose answer is still to come."""
    return {"prompt": request.prompt, "expected": dict(request.task.expected)}


def pair(rng: random.Random, request: Request) -> Row:
    """The right answer in good manners over one that is not."""
    rejected = rng.choice(_worse_answers(rng, request))
    return {"prompt": request.prompt, "chosen": request.task.right, "rejected": rejected} | {
        "expected": dict(request.task.expected)
    }


@dataclass(frozen=True)
class Case:
    """An answer that a critic looks at. found: whether it breaks the principle."""

    request: Request
    answer: str
    principle: Mapping[str, Any]
    found: bool

    @property
    def finding(self) -> str:
        """The critique."""
        return FINDINGS[self.principle["id"]] if self.found else NOTHING_FOUND


def critique(rng: random.Random, request: Request, constitution: Mapping[str, Any]) -> Row:
    """A row that shows how to critique an answer, how to revise it, or how to choose between two."""
    answer, broken = flawed_answer(rng, request)
    if not request.forbidden and rng.random() < OVER_REFUSED:
        answer, broken = rng.choice(REFUSALS), "helpful"
    principles = {principle["id"]: principle for principle in constitution["principles"]}
    others = [*principles, *([] if request.forbidden else ["lawful"] * MORE_LAWFUL)]
    asked = broken if broken and rng.random() < 0.6 else rng.choice(others)
    case = Case(request, answer, principles[asked], asked == broken)
    return rng.choice((_critique, _revision, _preference))(rng, case, constitution["forms"])


def _critique(_: random.Random, case: Case, forms: Mapping[str, str]) -> Row:
    asked = forms["critique"].format(prompt=case.request.prompt, answer=case.answer, request=case.principle["critique"])
    return _conversation(asked, case.finding)


def _revision(_: random.Random, case: Case, forms: Mapping[str, str]) -> Row:
    asked = forms["revision"].format(
        prompt=case.request.prompt, answer=case.answer, critique=case.finding, request=case.principle["revision"]
    )
    return _conversation(asked, case.request.task.right if case.found else case.answer)


def _preference(rng: random.Random, case: Case, forms: Mapping[str, str]) -> Row:
    """Choose between the right answer and one that breaks the principle; where no answer can, critique instead."""
    worse = case.answer if case.found else _breaking(rng, case.request, case.principle["id"])
    if not worse:
        return _critique(rng, case, forms)
    letter = rng.choice("AB")
    first, second = (case.request.task.right, worse)[:: 1 if letter == "A" else -1]
    asked = forms["preference"].format(
        prompt=case.request.prompt, first=first, second=second, question=case.principle["preference"]
    )
    return _conversation(asked, letter)


def _breaking(rng: random.Random, request: Request, principle: str) -> str:
    """An answer that breaks this principle; "" where none can: nothing forbidden is asked, or nothing allowed."""
    if principle == "lawful":
        return request.task.wrong if request.forbidden else ""
    if principle == "helpful":
        return "" if request.forbidden else rng.choice(REFUSALS)
    return spoil(rng, request.task.right, principle)


def _worse_answers(rng: random.Random, request: Request) -> list[str]:
    """Answers that lose against the right one; what the tone tempts to stands there twice."""
    task = request.task
    tempted = MANNER.get(request.tone)
    manner = spoil(rng, task.right, tempted or rng.choice(list(MANNER.values())))
    if request.forbidden:
        return [task.wrong, task.wrong, spoil(rng, task.wrong, tempted) if tempted else task.wrong, manner]
    return [manner, manner, task.wrong, rng.choice((task.wrong, rng.choice(REFUSALS)))]


def _conversation(request: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}
