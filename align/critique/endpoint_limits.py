"""How often and how much an endpoint may be asked: evenly spaced requests, and a budget of tokens. Safe for threads."""

from __future__ import annotations

import threading
import time

from align.errors import StageFailed


class Pace:
    """Spaces requests evenly. per_minute: the most of them; None: no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap_seconds = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def delay(self) -> float:
        """Take the next place; seconds to wait for it."""
        with self._lock:
            now = time.monotonic()
            place = max(now, self._next)
            self._next = place + self._gap_seconds
            return place - now


class TokenBudget:
    """Counts tokens. A request is promised the most that it may use before it is sent, so that threads cannot overspend.

    limit: tokens in all; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.used = 0
        self._limit = limit
        self._promised = 0
        self._settled = threading.Condition()

    def promise(self, tokens: int) -> None:
        """Set tokens aside, after the requests under way where only what they leave is enough.

        Raises StageFailed when the budget cannot hold them.
        """
        with self._settled:
            while self._limit is not None and self.used + self._promised + tokens > self._limit:
                if not self._promised:
                    raise StageFailed(
                        f"token_budget is used up: {self.used} of {self._limit} tokens are spent, and the next request "
                        f"may take {tokens}",
                        "Finished rows are kept; with a larger token_budget the same command goes on after them.",
                    )
                self._settled.wait()
            self._promised += tokens

    def settle(self, promised: int, used: int) -> None:
        """Replace a promise by what was used."""
        with self._settled:
            self._promised -= promised
            self.used += used
            self._settled.notify_all()
