"""Stop strings in a stream of text: nothing is sent that could still turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence

from stageline.errors import InvalidArgumentError


class StopMatcher:
    """Finds the stop string that is complete first; of several complete at the same character, the longest.

    So the result depends on the text alone, not on how tokens cut it. Knuth-Morris-Pratt for each stop string: amortized
    constant work a character and stop string.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`include_stop` sends the stop string too. Raises InvalidArgumentError for an empty one."""
        if "" in stops:
            raise InvalidArgumentError("STOP_STRING_EMPTY", "a stop string is empty; leave it out", field="stop")
        self._automata = [_Automaton(stop) for stop in stops]
        self._include = include_stop
        self._held = ""

    def append(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that may be sent now, and the stop string that was found; after it nothing more may be appended.

        With `may_stop` False (before min_tokens) a stop string that is complete within `text` does not count; one that
        begins in it and is complete later does.
        """
        if not self._automata:
            return text, None
        buffer, start = self._held + text, len(self._held)
        for end, char in enumerate(text, start=start + 1):
            complete = [automaton.stop for automaton in self._automata if automaton.advance(char)]
            if complete and may_stop:
                stop = max(complete, key=len)
                self._held = ""
                return buffer[: end if self._include else end - len(stop)], stop
        cut = len(buffer) - max(automaton.matched for automaton in self._automata)
        self._held = buffer[cut:]
        return buffer[:cut], None

    def finish(self) -> str:
        """What was held back and matched nothing."""
        rest, self._held = self._held, ""
        return rest


class _Automaton:
    """How much of one stop string the text ends with. `matched` is less than its length between calls."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        # _border[n]: length of the longest proper prefix of stop[:n] that also ends it.
        self._border = [0, 0]
        for char in stop[1:]:
            self._border.append(self._longer(self._border[-1], char))

    def advance(self, char: str) -> bool:
        """Take one character; whether the stop string is complete with it."""
        self.matched = self._longer(self.matched, char)
        if self.matched < len(self.stop):
            return False
        self.matched = self._border[self.matched]
        return True

    def _longer(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._border[matched]
        return matched + (self.stop[matched] == char)
