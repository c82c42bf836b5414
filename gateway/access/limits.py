"""What a tenant has used of its limits. Pure: the time comes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """A token bucket: `per_minute` flow in, evenly, and at most as many wait in it. It may be drawn on below zero.

    `per_minute` None is no limit.
    """

    per_minute: int | None
    level: float
    at_s: float

    @classmethod
    def full(cls, per_minute: int | None, now_s: float) -> Bucket:
        """With a minute's worth in it."""
        return cls(per_minute, float(per_minute or 0), now_s)

    def wait_s(self, amount: int, now_s: float) -> float:
        """Seconds until `amount` can be had, or a full bucket where it is more than that; 0 means now."""
        if self.per_minute is None:
            return 0.0
        self._refill(now_s)
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)

    def take(self, amount: int, now_s: float) -> None:
        """Draw, below zero if need be."""
        if self.per_minute is not None:
            self._refill(now_s)
            self.level -= amount

    def limit(self, per_minute: int | None, now_s: float) -> None:
        """Another limit from now on; what is owed stays owed."""
        if per_minute == self.per_minute:
            return
        if self.per_minute is None or per_minute is None:
            self.level = float(per_minute or 0)
        else:
            self._refill(now_s)
            self.level += per_minute - self.per_minute if per_minute > self.per_minute else 0
            self.level = min(self.level, per_minute)
        self.per_minute, self.at_s = per_minute, now_s

    def _refill(self, now_s: float) -> None:
        assert self.per_minute is not None
        if now_s > self.at_s:
            self.level = min(float(self.per_minute), self.level + (now_s - self.at_s) * self.per_minute / 60)
            self.at_s = now_s
