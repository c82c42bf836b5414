"""Runs shards: every request that has no durable record yet, a bounded number at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from dataclasses import dataclass
from functools import partial

from gateway.batch.bodies import checked_body
from gateway.batch.dataset.door import BACKOFF, Door, DoorSettings
from gateway.batch.dataset.journal import Record, ShardJournal
from gateway.batch.dataset.shards import Shard, read
from gateway.batch.dataset.storage import Place
from gateway.batch.lines import LineProblem, LineRequest
from gateway.batch.records import line_record
from stageline.errors import InvalidArgumentError, ResourceExhaustedError, StagelineError

logger = logging.getLogger("stageline.gateway.batch")

STORE_EVERY_S = 0.5  # records that end within this share a file: what a kill can lose


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """`concurrency`: requests at the door at once. `folder`: of the journals. `named`: errors of lines name their file."""

    door: DoorSettings
    folder: Place
    batch_id: str
    concurrency: int
    named: bool = False


class Runner:
    """One event loop on a thread of its own; `run` may be called from several threads at once, which share the places."""

    def __init__(self, settings: RunnerSettings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="batch-runner", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def run(self, index: int, shard: Shard) -> tuple[int, int]:
        """Returns (completed, failed) once all of the shard is durable.

        Raises ConfigError for an input that changed or an output that cannot be written, and as `Door.ask`.
        """
        return asyncio.run_coroutine_threadsafe(self._run(index, shard), self._loop).result()

    def close(self) -> None:
        """End the connections and the thread."""
        asyncio.run_coroutine_threadsafe(self._door.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _open(self) -> None:
        self._door = Door(self._settings.door)
        self._places = asyncio.Semaphore(self._settings.concurrency)

    async def _run(self, index: int, shard: Shard) -> tuple[int, int]:
        journal = ShardJournal(self._settings.folder, index)
        records = await asyncio.to_thread(journal.finished)
        rows = await asyncio.to_thread(read, shard)
        shelf = _Shelf(journal, records, self._settings.door.give_up_s)
        try:
            async with asyncio.TaskGroup() as group:
                storing = group.create_task(shelf.store())
                async with asyncio.TaskGroup() as lines:
                    for number, (line, what) in enumerate(rows, shard.requests_before + 1):
                        if number not in records:
                            await self._places.acquire()
                            lines.create_task(self._line(shelf, number, line, what, shard.url))
                shelf.end()
                await storing
        except BaseExceptionGroup as group_error:
            await shelf.keep()
            raise _first(group_error) from None
        await asyncio.to_thread(partial(journal.finish, records))
        failed = sum(not record.ok for record in records.values())
        return len(records) - failed, failed

    async def _line(self, shelf: _Shelf, number: int, line: int, what: LineRequest | LineProblem, url: str) -> None:
        try:
            shelf.put(number, await self._record(number, line, what, url))
        finally:
            self._places.release()

    async def _record(self, number: int, line: int, what: LineRequest | LineProblem, url: str) -> Record:
        batch_id = self._settings.batch_id
        if isinstance(what, LineProblem):
            message = f"{url.rpartition('/')[2]}: {what.error.message}" if self._settings.named else what.error.message
            error = InvalidArgumentError(what.error.reason, message)
            return Record(False, line_record(batch_id, number, what.custom_id, error=error, line=line))
        try:
            priority = checked_body(what).priority
        except InvalidArgumentError as error:
            return Record(False, line_record(batch_id, number, what.custom_id, error=error, ran=True))
        status, answer = await self._door.ask(what.url, {**what.body, "priority": priority}, f"{batch_id}-{number}")
        return Record(status == 200, line_record(batch_id, number, what.custom_id, body=answer, status=status))


class _Shelf:
    """Records on their way into the journal. `records` holds the durable ones."""

    def __init__(self, journal: ShardJournal, records: dict[int, Record], give_up_s: float) -> None:
        self._journal, self._records, self._give_up_s = journal, records, give_up_s
        self._waiting: dict[int, Record] = {}
        self._wake, self._ending = asyncio.Event(), False

    def put(self, number: int, record: Record) -> None:
        self._waiting[number] = record
        self._wake.set()

    def end(self) -> None:
        """No more will come."""
        self._ending = True
        self._wake.set()

    async def store(self) -> None:
        """Until the end: all that waits, whenever some does."""
        while not (self._ending and not self._waiting):
            await self._wake.wait()
            if not self._ending:
                await asyncio.sleep(STORE_EVERY_S)
            self._wake.clear()
            batch, self._waiting = self._waiting, {}
            if batch:
                await self._retried(batch)
                self._records.update(batch)

    async def keep(self) -> None:
        """What waits, as far as it can be stored: the shard has failed already."""
        if self._waiting:
            with contextlib.suppress(StagelineError):
                await asyncio.to_thread(self._journal.add, self._waiting)

    async def _retried(self, batch: dict[int, Record]) -> None:
        """What was computed is kept while a disk is full."""
        began_s, failures = time.monotonic(), 0
        while True:
            try:
                return await asyncio.to_thread(self._journal.add, batch)
            except ResourceExhaustedError as error:
                if time.monotonic() - began_s > self._give_up_s:
                    raise
                logger.warning("%s; trying again", error.message)
                await asyncio.sleep(BACKOFF.delay_s(failures, random.random()) or 0.0)
                failures += 1


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
