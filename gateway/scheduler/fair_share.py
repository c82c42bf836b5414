"""Virtual token counters: who was served least goes first (VTC, Sheng et al., OSDI'24, arXiv 2401.00588)."""

from __future__ import annotations

from collections.abc import Collection

PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0
"""The paper's weights: an output token costs a pass through the pipeline, a prompt token a part of one."""

PRUNE_ABOVE = 1024


class VirtualTokenCounters:
    """What each tenant was served, in weighted tokens.

    A tenant that comes back after a pause gets no credit for it: its counter is lifted to the least of those that wait,
    or, when nobody waits, to that of the tenant whose last sequence left the queue.
    """

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._last_left = 0.0

    def of(self, tenant: str) -> float:
        """Weighted tokens served, or the start of a tenant that is not known."""
        return self._counters.get(tenant, self._last_left)

    def activate(self, tenant: str, waiting: Collection[str]) -> None:
        """A sequence of `tenant` is queued while none of its own waited; `waiting` are the tenants that wait already."""
        floor = min((self.of(other) for other in waiting), default=self._last_left)
        self._counters[tenant] = max(self._counters.get(tenant, floor), floor)
        if len(self._counters) > PRUNE_ABOVE:  # counters at or under the floor say nothing: they would be lifted to it
            keep = {tenant, *waiting}
            self._counters = {name: value for name, value in self._counters.items() if name in keep or value > floor}

    def leave(self, tenant: str) -> None:
        """The last waiting sequence of `tenant` left the queue."""
        self._last_left = self.of(tenant)

    def charge(self, tenant: str, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Tokens computed for a tenant for the first time; what we compute again is our cost."""
        cost = prompt_tokens * PROMPT_TOKEN_COST + output_tokens * OUTPUT_TOKEN_COST
        self._counters[tenant] = self.of(tenant) + cost
