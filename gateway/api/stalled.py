"""Finds streams whose client has stopped to read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from gateway.api.errors import reader_stalled


class ReaderWatch:
    """Limits how long each write of one stream may take. One timer a stream instead of one a write, since writes are as many
    as tokens: a stall is found between `timeout_s` and a quarter more."""

    def __init__(self, timeout_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._loop, self._timeout_s = asyncio.get_running_loop(), timeout_s
        self._since_s = 0.0  # when the write that is under way began, else 0
        self._timer = self._loop.call_later(timeout_s / 4, self._look)
        self.stalled = False

    async def write(self, written: Awaitable[None]) -> None:
        """Await one write."""
        self._since_s = self._loop.time()
        await written
        self._since_s = 0.0

    def close(self) -> None:
        """The stream is over."""
        self._timer.cancel()

    def _look(self) -> None:
        if self._since_s and self._loop.time() - self._since_s >= self._timeout_s:
            self.stalled = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._timeout_s / 4, self._look)


@asynccontextmanager
async def watched(timeout_s: float) -> AsyncIterator[ReaderWatch]:
    """A watch over the writes of the current task. Raises ResourceExhaustedError READER_TOO_SLOW where one took too long."""
    watch = ReaderWatch(timeout_s)
    try:
        yield watch
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not watch.stalled or task is None or task.uncancel() > 0:
            raise  # somebody else wants it to end
        raise reader_stalled(timeout_s) from None
    finally:
        watch.close()
