"""The state with one writer thread: jobs that wait together are committed together, and each knows its own fate."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from gateway.batch.connection import Connection, State, StateFenced, StateUnreachable

logger = logging.getLogger("stageline.gateway.batch")

T = TypeVar("T")
MAX_JOBS_A_COMMIT = 256
NUM_READERS = 4
PATIENCE_S = 10.0  # a lost connection may take so long to come back before callers hear of it
RECONNECT_S = 0.2

_Job = tuple[Callable[[Connection], Any], Future[Any]]


class Database:
    """The state of one server. Jobs are functions of a connection; awaiting a write that returns means it is durable."""

    def __init__(self, state: State) -> None:
        """Raises ConfigError where the state cannot be used or another server has it."""
        self._state = state
        self._writer: Connection | None = state.open_writer()
        self._fenced: StateFenced | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="batch-writer", daemon=True)
        self._thread.start()
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()  # of readers
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="batch-reader")

    async def write(self, job: Callable[[Connection], T]) -> T:
        """Run `job` in a transaction and return once it is durable.

        The job may run again: where another one of the transaction failed, and where the connection was lost, then maybe on top
        of what it did the first time. Raises what `job` raises (nothing of it is kept then), ResourceExhaustedError for a full disk, StateUnreachable (whether it was kept is unknown),
        StateFenced, InternalError for what else the database meets.
        """
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return await asyncio.wrap_future(future)

    async def read(self, job: Callable[[Connection], T]) -> T:
        """Run `job` on one snapshot, on a connection of its own; it may run twice. Raises as `write`."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, job)

    def close(self) -> None:
        """Finish what is queued, then give the state back."""
        self._jobs.put(None)
        self._thread.join()
        self._readers.shutdown()
        while not self._idle.empty():
            self._idle.get().close()
        if self._writer is not None:
            self._writer.close()
        self._state.release()

    def _read(self, job: Callable[[Connection], T]) -> T:
        if self._fenced is not None:
            raise self._fenced
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            return self._read_on(self._state.open_reader(), job)
        try:
            return self._read_on(connection, job)
        except StateUnreachable:  # it may have been lost long ago
            return self._read_on(self._state.open_reader(), job)

    def _read_on(self, connection: Connection, job: Callable[[Connection], T]) -> T:
        try:
            connection.execute(self._state.begin_read)
            result = job(connection)
            connection.execute("COMMIT")
        except Exception as error:
            typed = self._state.typed(error)
            if isinstance(typed, StateUnreachable):
                connection.close()
            elif not self._lost(connection):
                self._idle.put(connection)
            raise typed from error
        self._idle.put(connection)
        return result

    def _lost(self, connection: Connection) -> bool:
        """After an error: whether the connection is of no more use; its transaction is over."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return False
        except Exception:
            connection.close()
            return True

    def _write_all(self) -> None:
        ending = False
        while not ending:
            try:
                group = [self._jobs.get(timeout=self._state.heartbeat_s)]
            except queue.Empty:
                self._write_some([])  # whoever lost the state hears of it soon
                continue
            while len(group) < MAX_JOBS_A_COMMIT and not self._jobs.empty():
                group.append(self._jobs.get())
            ending = None in group
            self._write_some([job for job in group if job is not None and job[1].set_running_or_notify_cancel()])

    def _write_some(self, jobs: Sequence[_Job]) -> None:
        # Only those wait who were there when the connection was lost: what became of them would be unknown.
        end_s = time.monotonic() + (PATIENCE_S if self._writer is not None else 0.0)
        apart = False
        while True:
            try:
                return self._attempt(jobs, apart)
            except StateUnreachable as error:
                if time.monotonic() >= end_s:
                    return _fail(jobs, error)
                time.sleep(RECONNECT_S)
            except Exception as error:
                if apart or len(jobs) < 2:
                    return _fail(jobs, error)
                apart = True  # one of them failed; that rarely happens, and savepoints are two more trips for each job

    def _attempt(self, jobs: Sequence[_Job], apart: bool) -> None:
        """One transaction; `apart`: a job that fails fails alone. Raises StateUnreachable where it was lost, and what else all
        jobs fail with."""
        connection = self._connected()
        done: list[tuple[Future[Any], Any]] = []
        try:
            connection.execute(self._state.begin_write)
            for job, future in jobs:
                if future.done():  # it failed in a transaction that was lost
                    continue
                if not apart:
                    done.append((future, job(connection)))
                elif result := self._run_apart(connection, job, future):
                    done.append((future, *result))
            connection.execute("COMMIT")
        except Exception as error:
            typed = self._state.typed(error)
            if self._lost(connection) or isinstance(typed, StateUnreachable):
                connection.close()
                self._writer = None
                logger.warning("batch state: %s", typed)
            raise typed from error
        for future, value in done:
            future.set_result(value)

    def _run_apart(self, connection: Connection, job: Callable[[Connection], T], future: Future[T]) -> tuple[T] | None:
        connection.execute("SAVEPOINT job")
        try:
            value = job(connection)
            connection.execute("RELEASE job")
            return (value,)
        except Exception as error:
            typed = self._state.typed(error)
            # SQLite gives up the whole transaction where the disk is full.
            if isinstance(typed, StateUnreachable) or not connection.in_transaction:
                raise
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            future.set_exception(typed)
            return None

    def _connected(self) -> Connection:
        if self._fenced is not None:
            raise self._fenced
        if self._writer is None:
            try:
                self._writer = self._state.open_writer()
            except StateFenced as error:
                logger.error("batches end here: %s", error)
                self._fenced = error
                raise
            logger.warning("batch state: connected again")
        return self._writer


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for _, future in jobs:
        if not future.done():
            future.set_exception(error)
