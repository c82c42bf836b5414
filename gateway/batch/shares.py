"""Whose line runs next: of the tenants with lines to run, the one that was served least; of its batches the oldest.

Batches of one tenant that took turns would end the first later and the last no sooner. The engine shares its steps among
tenants by the same counters, but it sees only the lines that run. Without this the places for them would all be taken by
whoever came first with a long batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gateway.scheduler.fair_share import VirtualTokenCounters


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch that has a line to run."""

    batch_id: str
    tenant: str


def next_batch(
    waiting: Sequence[Waiting], served: Callable[[str], float], running: Mapping[str, int], line_cost: float
) -> Waiting:
    """Of batches in the order they came; at least one. `served`: what a tenant's lines cost so far, in weighted tokens;
    `running` lines of a tenant count as `line_cost` each, since they will cost it."""
    return min(waiting, key=lambda batch: served(batch.tenant) + running.get(batch.tenant, 0) * line_cost)


class Shares:
    """What the batches of each tenant cost, while it has any."""

    def __init__(self) -> None:
        self._counters = VirtualTokenCounters()
        self._tenants: set[str] = set()
        self._lines, self._cost = 1, 1.0  # of lines that ended; before the first one every line counts as one

    def update(self, tenants: set[str]) -> None:
        """These have unfinished batches. One that comes begins level with the least served: it gets no credit for its pause."""
        for tenant in self._tenants - tenants:
            self._tenants.remove(tenant)
            self._counters.leave(tenant)
        for tenant in sorted(tenants - self._tenants):
            self._counters.activate(tenant, self._tenants)
            self._tenants.add(tenant)

    def charge(self, tenant: str, *, prompt_tokens: int, output_tokens: int) -> None:
        """A line ended."""
        before = self._counters.of(tenant)
        self._counters.charge(tenant, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        self._lines, self._cost = self._lines + 1, self._cost + self._counters.of(tenant) - before

    def next(self, waiting: Sequence[Waiting], running: Mapping[str, int]) -> Waiting:
        """See `next_batch`."""
        return next_batch(waiting, self._counters.of, running, self._cost / self._lines)
