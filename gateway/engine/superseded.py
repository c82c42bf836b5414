"""A gateway serves one model fingerprint. When all replicas there are hold another one, for long enough, its pipelines do not
come back: whoever waits hears so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.pipelines.discovery import Registry, ReplicaRecord
from stageline.errors import UnavailableError

LOOK_S = 0.5  # how often, while it may be so


@dataclass(frozen=True, slots=True)
class Superseded:
    """Since when, on the monotonic clock, only replicas of other fingerprints are there: None while that is not so. Pure."""

    since_s: float | None = None

    def after(self, replicas: Iterable[ReplicaRecord], *, in_use: bool, fingerprint: str, now_s: float) -> Superseded:
        """A look at all replicas. `in_use`: a pipeline runs; Serve lists none of its replicas while they drain. No replica at
        all says nothing: those of this fingerprint may be starting again."""
        others = {one.fingerprint for one in replicas}
        if in_use or not others or fingerprint in others:
            return Superseded()
        return self if self.since_s is not None else Superseded(now_s)

    def holds(self, now_s: float, after_s: float) -> bool:
        """Whether that has been so for `after_s` seconds."""
        return self.since_s is not None and now_s - self.since_s >= after_s


class ModelWatch:
    """Looks at the replicas of a registry. `in_use`: whether a pipeline runs."""

    def __init__(self, registry: Registry, *, fingerprint: str, after_s: float, in_use: Callable[[], bool]) -> None:
        self.superseded = False
        self._registry, self._fingerprint, self._after_s, self._in_use = registry, fingerprint, after_s, in_use
        self._state = Superseded()

    def look(self) -> bool:
        """Look once. Returns whether `superseded` changed."""
        now_s, before = time.monotonic(), self.superseded
        self._state = self._state.after(
            self._registry.replicas(), in_use=self._in_use(), fingerprint=self._fingerprint, now_s=now_s
        )
        self.superseded = self._state.holds(now_s, self._after_s)
        return self.superseded is not before

    @property
    def look_again_s(self) -> float | None:
        """Seconds until the next look, where nothing changes before it; None: then none is needed."""
        return None if self._state.since_s is None or self.superseded else LOOK_S

    def error(self) -> UnavailableError:
        """What requests hear. A retry can succeed at a gateway of the new model, or here if the old one is rolled back to."""
        return UnavailableError(
            "MODEL_SUPERSEDED",
            f"no stage holds the model of this gateway any more (fingerprint {self._fingerprint}): for {self._after_s:g} s all stages "
            "have been of another one; send the request to a gateway of that one, and stop this gateway",
            fingerprint=self._fingerprint,
        )
