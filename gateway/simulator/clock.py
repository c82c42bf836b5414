"""Virtual time, and processes that do one thing at a time in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

Action = Callable[[], None]
TINY_S = 1e-12  # what rounding may leave of a job


class Clock:
    """Runs actions in the order of their times; of equal times, in the order they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._number = 0
        self._events: list[tuple[float, int, Action]] = []

    def after(self, delay_s: float, action: Action) -> None:
        """Run `action` in `delay_s` seconds, at least 0."""
        assert delay_s >= 0
        self._number += 1
        heappush(self._events, (self.now_s + delay_s, self._number, action))

    def run(self, until_s: float) -> None:
        """Everything up to `until_s`."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, action = heappop(self._events)
            action()
        self.now_s = until_s


@dataclass(frozen=True, slots=True)
class Spent:
    """What a job took: from its start to its end, and on a core."""

    elapsed_s: float
    core_s: float


@dataclass(slots=True, eq=False)
class _Job:
    alone_s: float
    busy_s: float
    then: Callable[[Spent], None]
    began_s: float
    left: float = 1.0
    core_s: float = 0.0

    def seconds(self, share_busy: float) -> float:
        return self.alone_s + share_busy * (self.busy_s - self.alone_s)


class Cores:
    """`count` processors that jobs share evenly, as a kernel's fair scheduler does (None: each job has its own).

    While m jobs compute, each has min(1, count / m) of a core. On it a whole job takes as long as it does alone, or beside
    others up to its `busy_s`, in proportion to the cores that compute.
    """

    def __init__(self, clock: Clock, count: int | None) -> None:
        self._clock, self._count = clock, count
        self._jobs: list[_Job] = []
        self._updated_s = 0.0
        self._plan = 0  # outdates the event that waits for the next end

    def run(self, alone_s: float, busy_s: float, then: Callable[[Spent], None]) -> None:
        """Compute a job that takes `alone_s` alone and `busy_s` while all cores compute; then call `then`."""
        if self._count is None:
            self._clock.after(alone_s, lambda: then(Spent(alone_s, alone_s)))
            return
        self._advance()
        self._jobs.append(_Job(alone_s, busy_s, then, self._clock.now_s))
        self._await_next()

    def _speeds(self) -> tuple[float, float]:
        """Of a core, the share that each job has; of the cores but one, the share that computes."""
        assert self._count is not None
        computing = min(len(self._jobs), self._count)
        return computing / len(self._jobs), (computing - 1) / (self._count - 1) if self._count > 1 else 0.0

    def _advance(self) -> None:
        """Bring all jobs up to now."""
        passed_s, self._updated_s = self._clock.now_s - self._updated_s, self._clock.now_s
        if passed_s and self._jobs:
            share, busy = self._speeds()
            for job in self._jobs:
                job.left -= passed_s * share / max(job.seconds(busy), TINY_S)
                job.core_s += passed_s * share

    def _await_next(self) -> None:
        self._plan += 1
        if self._jobs:
            share, busy = self._speeds()
            soonest_s = min(job.left * job.seconds(busy) for job in self._jobs) / share
            plan = self._plan
            self._clock.after(max(0.0, soonest_s), lambda: self._end(plan))

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        _, busy = self._speeds()
        ended = [job for job in self._jobs if job.left * job.seconds(busy) <= TINY_S]
        self._jobs = [job for job in self._jobs if job not in ended]
        self._await_next()
        for job in ended:
            job.then(Spent(self._clock.now_s - job.began_s, job.core_s))


class Worker:
    """A process that does its jobs one after another, on the cores that it shares with others."""

    def __init__(self, clock: Clock, cores: Cores) -> None:
        self.busy_s = 0.0
        self._clock, self._cores = clock, cores
        self._jobs: deque[tuple[float, float, Callable[[Spent], None]]] = deque()
        self._working = self._dead = False

    def submit(self, job_s: float, then: Callable[[Spent], None], *, busy_s: float | None = None) -> None:
        """Work for `job_s` seconds (`busy_s` while all cores compute) when everything before is done, then call `then`."""
        self._jobs.append((job_s, job_s if busy_s is None else busy_s, then))
        self._next()

    def kill(self) -> None:
        """Nothing that was submitted ends any more; the job at work computes to its end, for nobody."""
        self._jobs.clear()
        self._dead = True

    def _next(self) -> None:
        if self._jobs and not self._working:
            self._working = True
            alone_s, busy_s, then = self._jobs.popleft()
            self._cores.run(alone_s, busy_s, lambda spent: self._done(spent, then))

    def _done(self, spent: Spent, then: Callable[[Spent], None]) -> None:
        self._working = False
        if not self._dead:
            self.busy_s += spent.core_s
            then(spent)
        self._next()
