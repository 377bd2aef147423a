"""Masks personal data in examples: e-mail, phone, card and account numbers, IP addresses.

Patterns and check digits, no model: names and postal addresses stay. Every pattern is bounded, so the time grows with the
length of the text only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any

from align.data.examples import Example, example_from_row

EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,6}[A-Za-z]{2,24}(?![\w-])")
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{1,4}){3,8}(?![A-Za-z0-9])")
CARD = re.compile(
    r"(?<![0-9.,-])(?:[2-6][0-9]{3}([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|3[47][0-9]{2}([ -]?)[0-9]{6}\2[0-9]{5})(?![0-9])"
)
IPV4 = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9]|\.[0-9])")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?![\w:])")
PHONE = re.compile(
    r"(?<![\w+.,-])(?<![0-9] )(?:"
    r"\+[1-9](?:[ ()./-]{0,2}[0-9]){7,14}"  # international
    r"|\([0-9]{3}\) ?[0-9]{3}[ .-][0-9]{4}|[0-9]{3}([.-])[0-9]{3}\1[0-9]{4}"  # North America
    r"|0[0-9]{2,4}[ /-][0-9]{3,4}(?:[ -]?[0-9]{2,4}){0,3}"  # national with area code
    r")(?![\w]|[.,][0-9])"
)


def masked(example: Example) -> tuple[Example, int]:
    """The example with personal data replaced by placeholders such as [EMAIL], and how many were replaced."""
    counts = [0]
    row = _masked_value(example.row(), counts)
    return (example_from_row(row), counts[0]) if counts[0] else (example, 0)


def masked_text(text: str) -> tuple[str, int]:
    """The text with personal data replaced by placeholders, and how many were replaced."""
    total = 0

    def replace(pattern: re.Pattern[str], placeholder: str, accept: Callable[[str], int]) -> None:
        """accept: how many characters of a match are the number itself (0: none, it only looks like one)."""

        def one(match: re.Match[str]) -> str:
            nonlocal total
            length = accept(match[0])
            total += length > 0
            return placeholder + match[0][length:] if length else match[0]

        nonlocal text
        text = pattern.sub(one, text)

    for pattern, placeholder, accept in PATTERNS:
        replace(pattern, placeholder, accept)
    return text, total


def _masked_value(value: Any, counts: list[int]) -> Any:
    if isinstance(value, str):
        text, count = masked_text(value)
        counts[0] += count
        return text
    if isinstance(value, Mapping):
        return {key: _masked_value(item, counts) for key, item in value.items()}
    return [_masked_value(item, counts) for item in value] if isinstance(value, list | tuple) else value


def _iban_length(text: str) -> int:
    """Length of the longest beginning of `text` with right check digits (ISO 7064, modulo 97)."""
    for end in range(len(text), 14, -1):
        if end < len(text) and text[end] != " ":
            continue
        digits = text[:end].replace(" ", "")
        if 15 <= len(digits) <= 34 and int("".join(str(int(c, 36)) for c in digits[4:] + digits[:4])) % 97 == 1:
            return end
    return 0


def _card_length(text: str) -> int:
    """The whole length when the check digit is right (Luhn)."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(text) if (sum(digits[::2]) + sum(doubled)) % 10 == 0 else 0


def _address_length(text: str) -> int:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return 0
    return len(text)


PATTERNS: tuple[tuple[re.Pattern[str], str, Callable[[str], int]], ...] = (
    (EMAIL, "[EMAIL]", len),
    (IBAN, "[IBAN]", _iban_length),
    (CARD, "[CARD]", _card_length),
    (IPV6, "[IP]", _address_length),
    (IPV4, "[IP]", _address_length),
    (PHONE, "[PHONE]", len),
)
