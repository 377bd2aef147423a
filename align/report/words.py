"""How values become words: numbers, times, labels, and text from data made safe to show. No markup, no layout."""

from __future__ import annotations

import math
import unicodedata
from datetime import datetime
from typing import Any

MINUS = "\N{MINUS SIGN}"
_REPLACED = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_ACRONYMS = {
    "kl": "KL",
    "id": "id",
    "f1": "F1",
    "bleu": "BLEU",
    "ece": "ECE",
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "gae": "GAE",
    "p50": "median",
    "p95": "95th percentile",
    "sha256": "SHA-256",
}


def printable(text: object, limit: int | None = None) -> str:
    """Text from data without anything that acts on a terminal or a reader's eye.

    Control characters become their pictures, characters that turn the reading direction or cannot be encoded become
    U+FFFD. limit: most characters; what is cut is counted.
    """
    words = str(text)
    if limit is not None and len(words) > limit:
        words = f"{words[:limit]}… ({len(words) - limit:,} more characters)"
    shown = words.replace("\r\n", "\n").translate(_REPLACED)
    return "".join("\ufffd" if _misleads(character) else character for character in shown)


def one_line(text: object, limit: int = 80) -> str:
    """`printable` text with its white space folded, for tables and titles."""
    words = " ".join(str(text).split())
    return printable(words if len(words) <= limit else words[: limit - 1] + "…")


def number(value: float, *, share: bool = False) -> str:
    """A number as a reader wants it: 87.0%, 12,345, 1.234, 2.0e−5, never more than five digits that matter."""
    if not math.isfinite(value):
        return "not finite"
    if share:
        return f"{value * 100:.1f}%".replace("-", MINUS)
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        words = f"{value:,.0f}"
    elif 0 < size < 0.001:
        words = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    else:
        words = f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return words.replace("-", MINUS)


def signed(value: float, *, share: bool = False) -> str:
    """A difference with its sign; a share's difference is in percentage points."""
    words = number(value, share=share)
    points = words.replace("%", " points") if share else words
    return f"+{points}" if value > 0 else points


def duration(seconds: float) -> str:
    """Seconds as a person says them: 38 s, 4 min 12 s, 1 h 05 min."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(value: Any) -> datetime | None:
    """A point in time from what a record holds: a datetime, ISO text or seconds since 1970; None when it is none."""
    if isinstance(value, datetime):
        return value
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(float(value))
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def day(value: Any) -> str:
    """A point in time to the minute, or an empty text."""
    when = moment(value)
    return f"{when:%Y-%m-%d %H:%M}" if when else ""


def label(name: str) -> str:
    """A key as words: tokens_per_second -> Tokens per second."""
    words = [_ACRONYMS.get(word, word) for word in name.replace("_", " ").replace(".", " ").replace("-", " ").split()]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def short(identifier: str) -> str:
    """The part of a content hash that is enough to find it."""
    return identifier[:10]


def plain(value: Any) -> str:
    """A setting or fact of any type in one line: yes/no, numbers, lists and mappings without brackets."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value}".replace("-", MINUS)
    if isinstance(value, float):
        return f"{value:g}".replace("-", MINUS)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value) or "none"
    return str(value)


def counted(value: Any) -> str:
    """As `plain`, with thousands set apart: for counts, where a setting would be copied as it stands."""
    return number(value) if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def _misleads(character: str) -> bool:
    return unicodedata.category(character) == "Cs" or unicodedata.bidirectional(character) in _TURNS


_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
