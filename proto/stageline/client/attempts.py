"""Whether a failed call is tried again, when and where. Pure: time and chance are passed in."""

from __future__ import annotations

from stageline.client.backoff import Backoff
from stageline.errors import ResourceExhaustedError, StagelineError, UnavailableError

RETRIED = (UnavailableError, ResourceExhaustedError)


class Attempts:
    """The attempts of one call of the user. `deadline_s` bounds all of them together, on the caller's monotonic clock."""

    def __init__(self, backoff: Backoff, deadline_s: float | None) -> None:
        self.number = 0
        self._backoff, self._deadline_s = backoff, deadline_s
        self._failures = 0  # in a row, without anything received in between

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the deadline, the timeout of the next attempt; None without one."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - now_s)

    def progressed(self) -> None:
        """Something new was received: the next failure is a first one."""
        self._failures = 0

    def wait_s(self, error: StagelineError, now_s: float, draw: float) -> float:
        """Seconds to wait before the next attempt, which goes to the next address; raises `error` where there is none."""
        if not isinstance(error, RETRIED):
            raise error
        wait_s = self._backoff.delay_s(
            self._failures,
            draw,
            retry_after_s=float(error.metadata.get("retry_after_s", 0.0)),
            left_s=self.left_s(now_s),
        )
        if wait_s is None:
            raise error
        self._failures += 1
        self.number += 1
        return wait_s
