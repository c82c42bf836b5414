"""What belongs to one epoch of a stage: its queues, its two loops, the link to the next stage, who watches.

A new epoch is a new object, so nothing of an old one can reach it. Queues are as deep as the steps a gateway may have in
flight: a full queue means that a neighbour is slow, and flow control carries that back to the gateway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from stageline.errors import FailedPreconditionError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.executor import StageExecutor
from stages.server.frames import StepFrame
from stages.server.intake import Intake
from stages.server.link import Link

T = TypeVar("T")


class EpochOverError(Exception):
    """The epoch ended while something of it was waited for."""


class Epoch:
    """Lives on one event loop; `compute` is one thread, which all epochs share, so that steps never overlap."""

    def __init__(self, number: int, compute: Executor, depth_steps: int) -> None:
        self.number = number
        self.executed_step = self.running_step = 0
        self.running_since_s: float | None = None  # on the monotonic clock; None while idle
        self.watchers: set[asyncio.Queue[pb.WatchResponse]] = set()
        self._executor: StageExecutor | None = None
        self._compute = compute
        self._inbox: asyncio.Queue[tuple[StepFrame, int]] = asyncio.Queue(depth_steps)
        self._outbox: asyncio.Queue[StepFrame] = asyncio.Queue(depth_steps)
        self._intake = Intake(number)
        self._taking = asyncio.Lock()
        self._link: Link | None = None
        self._over = self._read = False
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: set[asyncio.Future[Any]] = set()

    @property
    def connected(self) -> bool:
        """Whether steps flow."""
        return bool(self._tasks)

    async def connect(
        self, executor: StageExecutor, link: Link | None, on_failure: Callable[[BaseException], None]
    ) -> None:
        """Send to `link` from now on (None on the last stage) and begin to compute. Again: the old link is closed.

        `on_failure` is called where computing itself breaks, which no step of a client should cause.
        """
        self._executor = executor
        old, self._link = self._link, link
        if old is not None:
            await old.close()
        if not self._tasks and not self._over:
            loops = [self._compute_loop()] if link is None else [self._compute_loop(), self._send_loop()]
            self._tasks = [asyncio.create_task(loop) for loop in loops]
            for task in self._tasks:
                task.add_done_callback(lambda done: _report(done, on_failure))

    async def end(self) -> None:
        """Drop what is queued and whoever waits. The running kernel, if any, goes on; its output is dropped."""
        self._over = True
        for waiting in [*self._waiting, *self._tasks]:
            waiting.cancel()
        for queue in (self._inbox, self._outbox):
            while not queue.empty():
                queue.get_nowait()  # lets go of its memory, which may be shared
        if self._link is not None:
            await self._link.close()

    def let_go(self) -> None:
        """Hold the stage no longer, once the last kernel is done: its memory may be wanted for another."""
        self._executor = None

    async def until_over(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises EpochOverError as soon as the epoch ends."""
        task = asyncio.ensure_future(work)
        self._waiting.add(task)
        if self._over:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if self._over:
                raise EpochOverError from None
            raise
        finally:
            self._waiting.discard(task)

    async def put(self, frame: StepFrame) -> None:
        """Queue a step whose input is complete; waits while the queue is full. Raises what `Intake.admit` raises."""
        entry = (frame, time.monotonic_ns())
        async with self._taking:  # while one stream waits for room, another must not overtake it
            intake = self._intake.admit(epoch=frame.epoch, step_id=frame.step_id)
            if self._over or self._inbox.full():
                await self.until_over(self._inbox.put(entry))
            else:
                self._inbox.put_nowait(entry)
            self._intake = intake

    async def answer(self) -> StepFrame:
        """The next answer of the last stage."""
        if self._over or self._outbox.empty():
            return await self.until_over(self._outbox.get())
        return self._outbox.get_nowait()

    def take_results(self) -> None:
        """Answers go to one reader. Raises FailedPreconditionError for a second one at a time."""
        if self._read:
            raise FailedPreconditionError("RESULTS_TAKEN", "another stream already reads the results of this epoch")
        self._read = True

    def give_results_back(self) -> None:
        """The reader is gone."""
        self._read = False

    def publish(self, event: pb.WatchResponse) -> None:
        """Tell everyone who watches this epoch."""
        for watcher in self.watchers:
            watcher.put_nowait(event)

    async def _compute_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            work = loop.run_in_executor(self._compute, self._execute, *(await self._inbox.get()))
            await self._outbox.put(await work)  # nothing here holds the step: its memory may be shared

    def _execute(self, frame: StepFrame, received_ns: int) -> StepFrame:
        """On the compute thread: the count is right even where the epoch ends while the kernel runs."""
        assert self._executor is not None, "steps are taken once the epoch is connected"
        self.running_step, self.running_since_s = frame.step_id, time.monotonic()
        try:
            return self._executor.execute(frame, received_ns)
        finally:
            if frame.give_back is not None:
                frame.give_back()
            self.running_step, self.running_since_s, self.executed_step = 0, None, frame.step_id

    async def _send_loop(self) -> None:
        while True:
            frame = await self._outbox.get()
            assert self._link is not None
            await self._link.send(frame)


def _report(done: asyncio.Task[None], on_failure: Callable[[BaseException], None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        on_failure(error)
