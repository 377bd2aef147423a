"""Whether an answer is the one that was wanted: as whole words, exactly, or as a number. No model, no rules file."""

from __future__ import annotations

import math
import re
from typing import Literal

Compare = Literal["contains", "exact", "numeric"]
Answer = str | int | float

_MARKED_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)")  # the minus of 10-20 is a dash


def matches(answer: str, wanted: Answer, compare: Compare) -> bool:
    """Whether an answer is the wanted one."""
    if compare == "numeric":
        number, target = final_number(answer), _number_of(wanted)
        return number is not None and target is not None and math.isclose(number, target, rel_tol=1e-12, abs_tol=1e-12)
    if compare == "exact":
        return _plain(answer) == _plain(str(wanted))
    return holds(answer, str(wanted))


def comparable(wanted: Answer, compare: Compare) -> bool:
    """Whether a wanted answer holds anything to compare: a number, or a word."""
    return _number_of(wanted) is not None if compare == "numeric" else bool(_plain(str(wanted)))


def final_number(text: str) -> float | None:
    """The number after `####` (as in GSM8K), else the last number of the text; None where there is none."""
    found = _MARKED_NUMBER.findall(text) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _number_of(wanted: Answer) -> float | None:
    return wanted if isinstance(wanted, float) else final_number(str(wanted))


def holds(answer: str, words: str) -> bool:
    """Whether `words` stand in the answer as whole words, case and spacing aside."""
    plain = re.escape(_plain(words))
    return bool(plain) and re.search(rf"(?<!\w){plain}(?!\w)", _plain(answer)) is not None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?\"'")
