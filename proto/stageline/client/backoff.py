"""When to try again: exponential backoff with full jitter, within a total deadline. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Full jitter: attempt k waits a uniform draw from [0, min(max_s, initial_s * multiplier**k)] seconds."""

    initial_s: float = 0.1
    max_s: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.initial_s <= self.max_s and self.multiplier >= 1):
            raise ValueError(f"expected 0 < initial_s <= max_s and multiplier >= 1, got {self}")

    def delay_s(
        self, attempt: int, draw: float, *, retry_after_s: float = 0.0, left_s: float | None = None
    ) -> float | None:
        """Seconds to wait before the next try; None where the deadline would pass before it.

        `attempt` counts failures in a row from 0, `draw` is uniform in [0, 1). The server's `retry_after_s` (RetryInfo)
        is waited in full and the jitter added, so that clients told the same time do not come back together. `left_s`
        is what is left of the caller's deadline, None without one.
        """
        ceiling_s = self.initial_s
        for _ in range(attempt):  # multiplied step by step: a power of a long outage would overflow
            if ceiling_s >= self.max_s or self.multiplier == 1:
                break
            ceiling_s *= self.multiplier
        wait_s = retry_after_s + draw * min(ceiling_s, self.max_s)
        return None if left_s is not None and wait_s >= left_s else wait_s
