"""The sequences that hold no blocks, in service order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from gateway.scheduler.fair_share import VirtualTokenCounters
from gateway.scheduler.sequence import PRIORITY_HEAD_START, Sequence

Allowed = Callable[[Sequence], bool]


@dataclass(slots=True, eq=False)
class _Level:
    """Waiting sequences of one priority."""

    resumed: list[Sequence] = field(default_factory=list)  # by _place
    tenants: dict[str, deque[Sequence]] = field(default_factory=dict)  # by arrival; no empty one
    order: list[tuple[float, int, str]] = field(default_factory=list)
    """A heap of (counter, arrival of the head, tenant), one entry for each tenant in `ordered`. Both numbers only grow, so
    an entry that is out of date stands too early, never too late."""
    ordered: set[str] = field(default_factory=set)
    num_overtaken: int = 0
    """Sequences of higher priority that were served, since the last one of this level, while this level waited."""

    def __bool__(self) -> bool:
        return bool(self.resumed or self.tenants)

    def first(self, allowed: Allowed, counters: VirtualTokenCounters) -> Sequence | None:
        for sequence in self.resumed:
            if allowed(sequence):
                return sequence
        passed = []
        try:
            while self.order:
                entry = heappop(self.order)
                queue = self.tenants.get(entry[2])
                if queue is None:
                    self.ordered.discard(entry[2])
                    continue
                now = (counters.of(entry[2]), queue[0].arrival, entry[2])
                if entry != now:
                    heappush(self.order, now)
                    continue
                passed.append(entry)
                for sequence in queue:
                    if allowed(sequence):
                        return sequence
            return None
        finally:
            for entry in passed:
                heappush(self.order, entry)


class WaitingQueue:
    """Service order: priority; then sequences that ran before: those that were preempted, by `Sequence.rank`, then those
    whose pipeline was lost, the shortest first; then the tenant that was served least, and of its sequences the one that
    came first.

    Nobody starves. After `PRIORITY_HEAD_START` sequences of higher priority were served before a level, one of that level
    is. Within a level, the sequences that ran before are finitely many, and tenants overtake another one only until their
    counters reach its own.
    """

    def __init__(self) -> None:
        self.counters = VirtualTokenCounters()
        self.num_tokens = 0
        """Tokens to prefill for all of them, where nothing is cached."""
        self._num_background_tokens = 0  # of them, of those in the background
        self._levels: dict[int, _Level] = {}
        self._num_waiting_by_tenant: dict[str, int] = {}  # those that never ran
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        for level in self._levels.values():
            yield from level.resumed
            for queue in level.tenants.values():
                yield from queue

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at its place. One that never ran (not `resumed`) comes after all others of its tenant."""
        level = self._levels.setdefault(sequence.priority, _Level())
        if sequence.resumed:
            insort(level.resumed, sequence, key=_place)
        else:
            tenant = sequence.tenant
            if tenant not in self._num_waiting_by_tenant:
                self.counters.activate(tenant, self._num_waiting_by_tenant.keys())
                self._num_waiting_by_tenant[tenant] = 0
            self._num_waiting_by_tenant[tenant] += 1
            level.tenants.setdefault(tenant, deque()).append(sequence)
            if tenant not in level.ordered:
                level.ordered.add(tenant)
                heappush(level.order, (self.counters.of(tenant), level.tenants[tenant][0].arrival, tenant))
        self._count(sequence, 1)

    def first(self, allowed: Allowed = lambda sequence: True) -> Sequence | None:
        """The next sequence that is allowed to go."""
        for level in self._in_order():
            if (sequence := level.first(allowed, self.counters)) is not None:
                return sequence
        return None

    def serve(self, sequence: Sequence) -> None:
        """Take the sequence that `first` returned and remember who was overtaken."""
        self.remove(sequence)
        for priority, level in self._levels.items():
            if priority < sequence.priority:
                level.num_overtaken += 1
            elif priority == sequence.priority:
                level.num_overtaken = 0

    def remove(self, sequence: Sequence) -> None:
        """Take a given sequence, which must be here."""
        level = self._levels[sequence.priority]
        if sequence.resumed:
            index = bisect_left(level.resumed, _place(sequence), key=_place)
            assert level.resumed[index] is sequence
            del level.resumed[index]
        else:
            tenant = sequence.tenant
            level.tenants[tenant].remove(sequence)
            if not level.tenants[tenant]:
                del level.tenants[tenant]
            self._num_waiting_by_tenant[tenant] -= 1
            if not self._num_waiting_by_tenant[tenant]:
                del self._num_waiting_by_tenant[tenant]
                self.counters.leave(tenant)
        if not level:
            del self._levels[sequence.priority]
        self._count(sequence, -1)

    def num_tokens_of(self, background: bool | None) -> int:
        """`num_tokens` of all, of those in the background, or of the others."""
        if background is None:
            return self.num_tokens
        return self._num_background_tokens if background else self.num_tokens - self._num_background_tokens

    def _count(self, sequence: Sequence, sign: int) -> None:
        self._len += sign
        self.num_tokens += sign * sequence.num_tokens
        self._num_background_tokens += sign * sequence.num_tokens * sequence.is_background

    def _in_order(self) -> list[_Level]:
        late = [level for level in self._levels.values() if level.num_overtaken >= PRIORITY_HEAD_START]
        return late + [self._levels[priority] for priority in sorted(self._levels, reverse=True)]


def _place(sequence: Sequence) -> tuple[int, tuple[int, int]]:
    return sequence.rebuild_tokens, sequence.rank
