"""Virtual time, and processes that do one thing at a time in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from gateway.planner.catalogue import Host
from gateway.planner.cost import LoadedSeconds, at_load

Action = Callable[[], None]
TINY_S = 1e-12  # what rounding may leave of a job


def steady(seconds: float) -> LoadedSeconds:
    """The same under any load."""
    return seconds, seconds, seconds


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
    seconds: LoadedSeconds
    then: Callable[[Spent], None]
    began_s: float
    left: float = 1.0
    core_s: float = 0.0


class Cores:
    """The cores of a host that jobs share evenly, as a kernel's fair scheduler does (None: each job has its own).

    While m jobs compute, each has an even part of the cores, and takes on them as long as `Host.load` of m says.
    """

    def __init__(self, clock: Clock, host: Host | None) -> None:
        self._clock, self._host = clock, host
        self._jobs: list[_Job] = []
        self._updated_s = 0.0
        self._plan = 0  # outdates the event that waits for the next end

    def run(self, seconds: LoadedSeconds, then: Callable[[Spent], None]) -> None:
        """Compute a job; then call `then`."""
        if self._host is None:
            self._clock.after(seconds[0], lambda: then(Spent(seconds[0], seconds[0])))
            return
        self._advance()
        self._jobs.append(_Job(seconds, then, self._clock.now_s))
        self._await_next()

    def _speeds(self) -> tuple[float, float]:
        """Of a core, the share that each job has; and the load."""
        assert self._host is not None
        num_jobs = len(self._jobs)
        return self._host.capacity(num_jobs) / num_jobs, self._host.load(num_jobs)

    def _advance(self) -> None:
        """Bring all jobs up to now."""
        passed_s, self._updated_s = self._clock.now_s - self._updated_s, self._clock.now_s
        if passed_s and self._jobs:
            share, load = self._speeds()
            for job in self._jobs:
                job.left -= passed_s * share / max(at_load(job.seconds, load), TINY_S)
                job.core_s += passed_s * share

    def _await_next(self) -> None:
        self._plan += 1
        if self._jobs:
            share, load = self._speeds()
            soonest_s = min(job.left * at_load(job.seconds, load) for job in self._jobs) / share
            plan = self._plan
            self._clock.after(max(0.0, soonest_s), lambda: self._end(plan))

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        _, load = self._speeds()
        ended = [job for job in self._jobs if job.left * at_load(job.seconds, load) <= TINY_S]
        self._jobs = [job for job in self._jobs if job not in ended]
        self._await_next()
        for job in ended:
            job.then(Spent(self._clock.now_s - job.began_s, job.core_s))


class Worker:
    """A process that does its jobs one after another, on the cores that it shares with others."""

    def __init__(self, clock: Clock, cores: Cores) -> None:
        self.busy_s = 0.0
        self._clock, self._cores = clock, cores
        self._jobs: deque[tuple[LoadedSeconds, Callable[[Spent], None]]] = deque()
        self._working = self._dead = False

    def submit(self, seconds: LoadedSeconds, then: Callable[[Spent], None]) -> None:
        """Work when everything before is done, then call `then`."""
        self._jobs.append((seconds, then))
        self._next()

    def kill(self) -> None:
        """Nothing that was submitted ends any more; the job at work computes to its end, for nobody."""
        self._jobs.clear()
        self._dead = True

    def _next(self) -> None:
        if self._jobs and not self._working:
            self._working = True
            seconds, then = self._jobs.popleft()
            self._cores.run(seconds, lambda spent: self._done(spent, then))

    def _done(self, spent: Spent, then: Callable[[Spent], None]) -> None:
        self._working = False
        if not self._dead:
            self.busy_s += spent.core_s
            then(spent)
        self._next()
