"""Virtual time, and processes that do one thing at a time in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], None]


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


class Cores:
    """At most `count` jobs at once (None: any number); those that wait are served in order, none is interrupted."""

    def __init__(self, count: int | None) -> None:
        self._free = count
        self._waiting: deque[Action] = deque()

    def acquire(self, action: Action) -> None:
        """Run `action` as soon as a core is free; it must lead to `release`."""
        if self._free is None:
            action()
        elif self._free:
            self._free -= 1
            action()
        else:
            self._waiting.append(action)

    def release(self) -> None:
        """Give the core back, to whoever waits longest."""
        if self._free is None:
            return
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._free += 1


class Worker:
    """A process that does its jobs one after another, each of them on a core."""

    def __init__(self, clock: Clock, cores: Cores) -> None:
        self.busy_s = 0.0
        self._clock, self._cores = clock, cores
        self._jobs: deque[tuple[float, Action]] = deque()
        self._working = self._dead = False

    def submit(self, job_s: float, then: Action) -> None:
        """Work for `job_s` seconds when everything before is done, then call `then`."""
        self._jobs.append((job_s, then))
        self._next()

    def kill(self) -> None:
        """Nothing that was submitted ends any more; the core of the job at work is free at the end of that job."""
        self._jobs.clear()
        self._dead = True

    def _next(self) -> None:
        if self._jobs and not self._working:
            self._working = True
            self._cores.acquire(self._start)

    def _start(self) -> None:
        if not self._jobs:  # killed while it waited for a core
            self._working = False
            self._cores.release()
            return
        job_s, then = self._jobs.popleft()
        self._clock.after(job_s, lambda: self._done(job_s, then))

    def _done(self, job_s: float, then: Action) -> None:
        self._working = False
        self._cores.release()
        if not self._dead:
            self.busy_s += job_s
            then()
        self._next()
