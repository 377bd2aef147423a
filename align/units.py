"""Bytes of memory for people."""

from __future__ import annotations

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def in_units(count: float) -> str:
    """1.5 GiB."""
    place = 0
    while count >= 1024 and place < len(UNITS) - 1:
        count, place = count / 1024, place + 1
    return f"{count:.0f} bytes" if place == 0 else f"{count:.1f} {UNITS[place]}"
