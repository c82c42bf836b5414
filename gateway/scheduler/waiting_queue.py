"""The sequences that hold no blocks, in service order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from gateway.scheduler.sequence import Sequence


def _key(sequence: Sequence) -> tuple[int, int]:
    # Descending, so that the next one stands at the end, where a list gives it up for free.
    place, arrival = sequence.rank
    return -place, -arrival


class WaitingQueue:
    """Sequences by `Sequence.rank`, lowest first. A preempted one returns to its rank, before all who came after it."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_tokens = 0
        """Tokens to prefill for all of them."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """In service order."""
        return reversed(self._sequences)

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at its place."""
        insort(self._sequences, sequence, key=_key)
        self.num_tokens += sequence.num_tokens

    def peek(self) -> Sequence:
        """The next sequence; the queue must not be empty."""
        return self._sequences[-1]

    def pop(self) -> Sequence:
        """Take the next sequence; the queue must not be empty."""
        sequence = self._sequences.pop()
        self.num_tokens -= sequence.num_tokens
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a given sequence, which must be here."""
        index = bisect_left(self._sequences, _key(sequence), key=_key)
        assert self._sequences[index] is sequence
        del self._sequences[index]
        self.num_tokens -= sequence.num_tokens
