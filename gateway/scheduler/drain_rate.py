"""How fast the queue empties, to tell those who are refused when to come back."""

from __future__ import annotations

import math

WINDOW_S = 10.0
LEAST_S, MOST_S = 0.1, 60.0
UNKNOWN_S = 1.0


class DrainRate:
    """Tokens a second that leave the queue, recent ones counting most (exponential window of `WINDOW_S`)."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._since_s: float | None = None

    def observe(self, num_tokens: int, now_s: float) -> None:
        """`num_tokens` left the queue at `now_s`."""
        self._advance(now_s)
        self._tokens += num_tokens

    def retry_after_s(self, waiting_tokens: int, now_s: float) -> float:
        """Seconds until what waits now has left, between 0.1 and 60; 1 while the rate is not known."""
        self._advance(now_s)
        if self._seconds == 0 or self._tokens == 0:
            return UNKNOWN_S
        seconds = waiting_tokens * self._seconds / self._tokens
        return round(min(MOST_S, max(LEAST_S, seconds)), 3)

    def _advance(self, now_s: float) -> None:
        if self._since_s is None:
            self._since_s = now_s
            return
        passed = max(0.0, now_s - self._since_s)
        kept = math.exp(-passed / WINDOW_S)
        self._tokens *= kept
        self._seconds = self._seconds * kept + WINDOW_S * (1 - kept)
        self._since_s = now_s
