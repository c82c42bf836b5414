"""Runs pending lines, a bounded number at a time, shared among tenants; retries what can succeed later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gateway.api.errors import as_typed
from gateway.batch import store
from gateway.batch.connection import StateFenced
from gateway.batch.database import Database
from gateway.batch.lines import LineProblem, LineRequest, is_blank, read_line
from gateway.batch.records import line_record
from gateway.batch.shares import Shares, Waiting
from gateway.batch.types import Batch
from stageline.client.backoff import Backoff
from stageline.errors import (
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    StagelineError,
    UnavailableError,
)

logger = logging.getLogger("stageline.gateway.batch")

RETRIED = (UnavailableError, ResourceExhaustedError)
KEPT = (*RETRIED, InternalError)  # what storing a record may meet: a full disk has several names
BACKOFF = Backoff(initial_s=0.2, max_s=30.0)
ASSUMED_LINE_TOKENS = 512  # prompt and answer, before a line has ended
BUG_DELAY_S = 10.0  # before a line runs again whose running failed in a way that nobody foresaw

Run = Callable[[LineRequest, str, str], Awaitable[dict[str, Any]]]  # (request, tenant, request_id) → the answer's body


@dataclass(slots=True)
class _Feed:
    """What is left to start of one batch, and what runs of it."""

    id: str
    tenant: str
    lines: deque[tuple[int, bytes]] = field(default_factory=deque)
    cursor: int = 0
    exhausted: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Worker:
    """One task that starts and ends others; all it decides on is in the database, so it may die at any point."""

    def __init__(self, database: Database, run: Run, *, max_concurrency: int, backoff: Backoff = BACKOFF) -> None:
        self._database, self._run, self._max_concurrency, self._backoff = database, run, max_concurrency, backoff
        self._feeds: dict[str, _Feed] = {}
        self._shares = Shares()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._waiting_lines = self._answered_lines = self._answered_tokens = 0

    def start(self) -> None:
        """Begin, with what an earlier server left."""
        self._task = asyncio.create_task(self._work())

    @property
    def backlog_tokens(self) -> int:
        """Of lines that do not run yet, each taken to be as long as those before it were."""
        running = sum(len(feed.tasks) for feed in self._feeds.values())
        each = self._answered_tokens // self._answered_lines if self._answered_lines else ASSUMED_LINE_TOKENS
        return max(0, self._waiting_lines - running) * each

    def notify(self) -> None:
        """A batch was created or is to be cancelled."""
        self._wake.set()

    async def stop(self) -> None:
        """End at once; lines that run are run again by the next server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for feed in self._feeds.values():
            await _end(feed)

    async def _work(self) -> None:
        failures = 0
        while True:
            try:
                await self._round()
                failures = 0
            except StateFenced:
                self._waiting_lines = 0
                for batch_id in list(self._feeds):
                    await self._stop_running(batch_id)
                return  # the server that owns the state goes on
            except Exception as error:
                logger.error("batches pause: %s", as_typed(error, where="the batch worker").message)
                await asyncio.sleep(self._backoff.delay_s(failures, random.random()) or 0.0)
                failures += 1

    async def _round(self) -> None:
        """End what is to end, fill free places, wait for the next reason to do so."""
        self._wake.clear()
        batches = await self._database.read(store.unfinished)
        now_s = time.time()
        going = []
        for batch in batches:
            if batch.status == "cancelling":
                await self._stop_running(batch.id)
                await self._database.write(partial(store.end_cancelled, batch_id=batch.id, now_s=int(time.time())))
            elif batch.expires_s is not None and batch.expires_s <= now_s:
                await self._expire(batch)
            else:
                going.append(batch)
        self._waiting_lines = sum(batch.total - batch.completed - batch.failed for batch in going)
        for gone in self._feeds.keys() - {batch.id for batch in going}:
            await self._stop_running(gone)
        self._shares.update({batch.tenant for batch in going})
        await self._fill([self._feeds.setdefault(batch.id, _Feed(batch.id, batch.tenant)) for batch in going])
        expiries = [batch.expires_s - now_s for batch in going if batch.expires_s is not None]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, min(expiries)) if expiries else None)

    async def _fill(self, feeds: Sequence[_Feed]) -> None:
        """Start lines while there are places for them; `feeds` in the order their batches came."""
        running = Counter[str]()
        for feed in self._feeds.values():
            running[feed.tenant] += len(feed.tasks)
        waiting = [Waiting(feed.id, feed.tenant) for feed in feeds if await self._has_line(feed)]
        # Lines that end meanwhile wake the next round.
        while waiting and running.total() < self._max_concurrency:
            chosen = self._shares.next(waiting, running)
            feed = self._feeds[chosen.batch_id]
            line = feed.lines.popleft()
            task = asyncio.create_task(self._line(feed, *line))
            feed.tasks.add(task)
            task.add_done_callback(partial(self._ended, feed, line))
            running[feed.tenant] += 1
            if not await self._has_line(feed):
                waiting.remove(chosen)

    async def _has_line(self, feed: _Feed) -> bool:
        while not feed.lines and not feed.exhausted:
            page = await self._database.read(lambda c: store.pending(c, feed.id, feed.cursor))
            feed.exhausted = not page
            feed.cursor = page[-1][0] if page else feed.cursor
            feed.lines.extend((number, line) for number, line in page if not is_blank(line))
        return bool(feed.lines)

    def _ended(self, feed: _Feed, line: tuple[int, bytes], task: asyncio.Task[None]) -> None:
        feed.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), StateFenced):
            logger.error(
                "batch %s: line %d will run again", feed.id, line[0], exc_info=task.exception(),
                extra={"batch_id": feed.id},
            )  # fmt: skip
            asyncio.get_running_loop().call_later(BUG_DELAY_S, self._again, feed, line)
        self._wake.set()

    def _again(self, feed: _Feed, line: tuple[int, bytes]) -> None:
        feed.lines.append(line)
        self._wake.set()

    async def _line(self, feed: _Feed, number: int, line: bytes) -> None:
        """Run a line until it has an answer or an error that stays, and return when its record is durable."""
        batch_id = feed.id
        read = read_line(line, number, "")
        record, ok = b"", False
        if isinstance(read, LineProblem):
            record = line_record(batch_id, number, read.custom_id, error=read.error)
        else:
            try:
                body = await self._retried(lambda: self._run(read, feed.tenant, f"{batch_id}-{number}"))
                record, ok = line_record(batch_id, number, read.custom_id, body=body), True
                usage = body.get("usage") or {"prompt_tokens": ASSUMED_LINE_TOKENS}
                prompt_tokens, output_tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
                self._answered_lines += 1
                self._answered_tokens += prompt_tokens + output_tokens
                self._shares.charge(feed.tenant, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
            except Exception as error:
                typed = as_typed(error, where=f"line {number} of {batch_id}")
                record = line_record(batch_id, number, read.custom_id, error=typed, ran=True)
        await self._retried(
            lambda: self._database.write(
                lambda c: store.add_result(c, batch_id, number, record, ok=ok, now_s=int(time.time()))
            ),
            KEPT,  # what was computed is not thrown away
        )

    async def _retried(
        self, action: Callable[[], Awaitable[Any]], errors: tuple[type[StagelineError], ...] = RETRIED
    ) -> Any:
        """What `action` returns, as soon as it does not fail with one of `errors`."""
        failures = 0
        while True:
            try:
                return await action()
            except StateFenced:
                raise
            except errors as error:
                retry_after_s = float(error.metadata.get("retry_after_s", 0.0))
                delay_s = self._backoff.delay_s(failures, random.random(), retry_after_s=retry_after_s)
                assert delay_s is not None  # no deadline was given
                failures += 1
                await asyncio.sleep(delay_s)

    async def _expire(self, batch: Batch) -> None:
        await self._stop_running(batch.id)
        error: StagelineError = DeadlineExceededError(
            "BATCH_EXPIRED", "the batch's completion window ended before this line ran", window_s=batch.window_s
        )
        records, after = [], 0
        while page := await self._database.read(partial(store.pending, batch_id=batch.id, after_line=after)):
            for number, line in page:
                if not is_blank(line):
                    custom_id = read_line(line, number, "").custom_id
                    records.append((number, line_record(batch.id, number, custom_id, error=error)))
            after = page[-1][0]
        await self._database.write(lambda c: store.end_expired(c, batch.id, records, int(time.time())))

    async def _stop_running(self, batch_id: str) -> None:
        feed = self._feeds.pop(batch_id, None)
        if feed is not None:
            await _end(feed)


async def _end(feed: _Feed) -> None:
    for task in feed.tasks:
        task.cancel()
    await asyncio.gather(*feed.tasks, return_exceptions=True)
