"""Whether all stages belong to other gateways: then who waits here waits in vain, and had better ask there. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from stageline.errors import UnavailableError


@dataclass
class Ownership:
    """Since when stages answer that another gateway owns them. One that died holds its stages for `lease_s` at most, so only
    what is owned for longer belongs to one that lives. Times are of one monotonic clock, in seconds."""

    lease_s: float
    _since_s: dict[str, float] = field(default_factory=dict)  # by incarnation

    def saw(self, incarnation: str, *, taken: bool, now_s: float) -> None:
        """What a stage answered; `taken`: another gateway owns it."""
        if taken:
            self._since_s.setdefault(incarnation, now_s)
        else:
            self._since_s.pop(incarnation, None)

    def forget_all_but(self, known: Collection[str]) -> None:
        """Stages that are gone."""
        self._since_s = {name: since_s for name, since_s in self._since_s.items() if name in known}

    def all_taken(self, living: Iterable[str], now_s: float) -> bool:
        """Whether others have had every one of these stages, of which there is at least one, for longer than a lease."""
        since_s = [self._since_s.get(name, now_s) for name in living]
        return bool(since_s) and all(now_s - one > self.lease_s for one in since_s)


def pipelines_taken() -> UnavailableError:
    """For requests that would wait in vain."""
    return UnavailableError("PIPELINES_TAKEN", "other gateways have all pipelines; retry at one of them")
