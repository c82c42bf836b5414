"""Stop strings in a stream of text: nothing is sent that could still turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that begins first; of several that begin there, the first one given."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops, self._include = tuple(stops), include_stop
        self._held = ""

    def append(self, text: str) -> tuple[str, str | None]:
        """Text that may be sent now, and the stop string that was found. After a match nothing more may be appended."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(place, order) for order, stop in enumerate(self._stops) if (place := self._held.find(stop)) >= 0]
        if found:
            place, order = min(found)
            stop = self._stops[order]
            return self._held[: place + len(stop) if self._include else place], stop
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready, None

    def finish(self) -> str:
        """What was held back and matched nothing."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a beginning of `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
