"""The batch state in an SQLite file. A lock file says which server owns it: the kernel drops the lock with the process."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from pathlib import Path

from gateway.batch.connection import Connection
from gateway.batch.schema import SQLITE, VERSION
from stageline.errors import ConfigError, InternalError, ResourceExhaustedError, StagelineError

logger = logging.getLogger("stageline.gateway.batch")

LOCK_TIMEOUT_S = 10.0  # a server that is ending gives the state back within this


class SqliteState:
    """See `connection.State`; its connections are never lost."""

    begin_write = "BEGIN IMMEDIATE"
    begin_read = "BEGIN"
    heartbeat_s = None

    def __init__(self, path: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._path, self._lock_timeout_s = path, lock_timeout_s
        self._lock: int | None = None

    def open_writer(self) -> Connection:
        """Raises ConfigError where the file cannot be opened, is not ours, or another server has it."""
        if self._lock is None:
            self._lock = _lock(self._path, self._lock_timeout_s)
        try:
            connection = self._open()
            _prepare(connection, self._path)
            return connection
        except BaseException:
            self.release()
            raise

    def open_reader(self) -> Connection:
        """A connection that changes nothing."""
        connection = self._open()
        connection.execute("PRAGMA query_only = 1")
        return connection

    def release(self) -> None:
        """Another server may have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def typed(self, error: Exception) -> Exception:
        """See `connection.State`."""
        if isinstance(error, StagelineError) or not isinstance(error, sqlite3.Error):
            return error
        # SQLite calls a quota and a limit of file sizes an I/O error of a write.
        code = getattr(error, "sqlite_errorcode", 0)  # an error of the module itself has none
        if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_WRITE:
            return disk_full(str(error))
        logger.error("batch state: %s", error, exc_info=error)
        return InternalError("STATE_FAILED", f"the batch state could not be used: {error}")

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10.0)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = 1")
        return connection


def disk_full(problem: str) -> ResourceExhaustedError:
    """What callers hear when the state cannot grow."""
    return ResourceExhaustedError(
        "STATE_DISK_FULL",
        f"the batch state cannot grow ({problem}): free some space on its disk, or raise the quota; nothing stored was lost",
        retry_after_s=10.0,
    )  # fmt: skip


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
            connection.executescript(f"BEGIN; {SQLITE} PRAGMA user_version = {VERSION}; COMMIT;")
    except sqlite3.Error as error:
        raise ConfigError(
            "STATE_UNREADABLE", f"batch.state_url: {path} cannot be used as SQLite state: {error}",
            field="batch.state_url", path=path,
        ) from None  # fmt: skip


def _lock(path: Path, timeout_s: float) -> int:
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
