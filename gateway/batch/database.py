"""SQLite with one writer thread: jobs that wait together are committed together, and each knows its own fate."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gateway.batch.schema import SCHEMA, VERSION
from stageline.errors import ConfigError, InternalError, ResourceExhaustedError, StagelineError

logger = logging.getLogger("stageline.gateway.batch")

T = TypeVar("T")
MAX_JOBS_A_COMMIT = 256
NUM_READERS = 4
LOCK_TIMEOUT_S = 10.0  # a server that is ending gives the state back within this


class Database:
    """The file of one server. Jobs are functions of a connection; awaiting a write that returns means it is on disk."""

    def __init__(self, path: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Raises ConfigError where the file cannot be opened, is not ours, or another server has it."""
        self._path = path
        self._lock = _lock(path, lock_timeout_s)
        try:
            self._writer = _open(path)
            _prepare(self._writer, path)
        except BaseException:
            os.close(self._lock)
            raise
        self._jobs: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="batch-writer", daemon=True)
        self._thread.start()
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="batch-reader")

    async def write(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` in a transaction and return once it is durable.

        Raises what `job` raises (nothing of it is kept then), ResourceExhaustedError for a full disk, InternalError for
        what else SQLite meets.
        """
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return await asyncio.wrap_future(future)

    async def read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` on a connection of its own. Raises as `write`."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, job)

    def close(self) -> None:
        """Finish what is queued, then give the file back."""
        self._jobs.put(None)
        self._thread.join()
        self._readers.shutdown()
        self._writer.close()
        os.close(self._lock)

    def _read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _open(self._path)
            connection.execute("PRAGMA query_only = 1")
        try:
            return job(connection)
        except sqlite3.Error as error:
            raise _typed(error) from error

    def _write_all(self) -> None:
        ending = False
        while not ending:
            batch = [self._jobs.get()]
            while len(batch) < MAX_JOBS_A_COMMIT and not self._jobs.empty():
                batch.append(self._jobs.get())
            ending = None in batch
            self._write_some([job for job in batch if job is not None and job[1].set_running_or_notify_cancel()])

    def _write_some(self, jobs: list[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]]) -> None:
        connection = self._writer
        done: list[tuple[Future[Any], Any]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job, future in jobs:
                connection.execute("SAVEPOINT job")
                try:
                    done.append((future, job(connection)))
                    connection.execute("RELEASE job")
                except Exception as error:
                    if not connection.in_transaction:  # SQLite gave up the whole transaction, a full disk does that
                        raise
                    connection.execute("ROLLBACK TO job")
                    connection.execute("RELEASE job")
                    done = [one for one in done if one[0] is not future]
                    future.set_exception(_typed(error))
            connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for _, future in jobs:
                if not future.done():
                    future.set_exception(_typed(error))
            return
        for future, result in done:
            future.set_result(result)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = 1")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        foreign = not version and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if foreign or version not in (0, VERSION):
            raise ConfigError(
                "STATE_OF_ANOTHER_PROGRAM",
                f"batch.state_url: {path} holds tables that are not of this version; name another file",
                field="batch.state_url", path=path,
            )  # fmt: skip
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what is counted survives a power failure
        if not version:
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
    except sqlite3.Error as error:
        raise ConfigError(
            "STATE_UNREADABLE", f"batch.state_url: {path} cannot be used as SQLite state: {error}",
            field="batch.state_url", path=path,
        ) from None  # fmt: skip


def _lock(path: Path, timeout_s: float) -> int:
    # A lock of the process: the kernel drops it when the process dies, however it dies.
    problem = "another server uses it; stop that one or name another file"
    try:
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            "STATE_UNREADABLE", f"batch.state_url: {path} cannot be opened: {error.strerror}",
            field="batch.state_url", path=path,
        ) from None  # fmt: skip
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            if time.monotonic() >= end_s:
                os.close(handle)
                raise ConfigError(
                    "STATE_IN_USE", f"batch.state_url: {path}: {problem}", field="batch.state_url", path=path
                ) from None
            time.sleep(0.1)


def _typed(error: Exception) -> Exception:
    if isinstance(error, StagelineError) or not isinstance(error, sqlite3.Error):
        return error
    # SQLite calls a quota and a limit of file sizes an I/O error of a write.
    if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL or error.sqlite_errorcode == sqlite3.SQLITE_IOERR_WRITE:
        return ResourceExhaustedError(
            "STATE_DISK_FULL",
            f"the batch state cannot grow ({error}): free some space on its disk, or raise the quota; nothing stored was lost",
            retry_after_s=10.0,
        )  # fmt: skip
    logger.error("batch state: %s", error, exc_info=error)
    return InternalError("STATE_FAILED", f"the batch state could not be used: {error}")
