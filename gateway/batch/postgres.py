"""The batch state in a PostgreSQL database, in a schema of its own. Needs psycopg, so it is imported where it is used.

One server owns the state: its writer's session holds an advisory lock, and all that is written is written in that session. A
session that ends, however it ends, has released the lock and can write no more. `owner.epoch` counts the owners, so that one
whose connection was lost learns whether there was another meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from psycopg import errors, pq
from psycopg.rows import DictRow, dict_row

from gateway.batch.connection import Connection, Rows, StateFenced, StateUnreachable
from gateway.batch.schema import POSTGRES, VERSION
from gateway.batch.sqlite import LOCK_TIMEOUT_S, disk_full
from gateway.batch.state_url import PostgresAddress
from stageline.errors import ConfigError, InternalError, InvalidArgumentError, StagelineError

logger = logging.getLogger("stageline.gateway.batch")

LOCK_KEY = 0x7374_6167_656C_696E  # "stagelin", of the whole database
_DEFAULTS = {
    "application_name": "stageline batches",
    "connect_timeout": "10",
    # Seconds until a host that vanished without a word is noticed.
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
}
# The same on PostgreSQL's side: a server whose host died gives the lock back. Those that a version lacks are left out.
_SETTINGS = """
SELECT set_config(s.name, wanted.value, false) FROM (VALUES
    ('search_path', 'stageline'), ('idle_session_timeout', '0'), ('tcp_keepalives_idle', '10'),
    ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'), ('tcp_user_timeout', '25000')
) AS wanted (name, value) JOIN pg_settings s ON s.name = wanted.name
"""


class PostgresState:
    """See `connection.State`."""

    begin_write = "BEGIN"
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    heartbeat_s = 5.0

    def __init__(self, address: PostgresAddress, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._address, self._lock_timeout_s = address, lock_timeout_s
        self._epoch: int | None = None
        self._session: tuple[Any, Any] = (None, None)  # of the last writer: process id and when it began

    def open_writer(self) -> Connection:
        """See `connection.State`."""
        try:
            connection = self._connect()
            try:
                if self._epoch is None:
                    self._claim(connection)
                else:
                    self._claim_again(connection, self._epoch)
                self._session = (row := connection.execute(_OWN_SESSION).fetchone())["pid"], row["backend_start"]
                return connection
            except BaseException:
                connection.close()
                raise
        except psycopg.Error as error:
            if self._epoch is not None:
                raise self.typed(error) from error
            raise ConfigError(
                "STATE_UNREADABLE", f"batch.state_url: {self._address.shown} cannot be used as PostgreSQL state: {_line(error)}",
                field="batch.state_url", url=self._address.shown,
            ) from None  # fmt: skip

    def open_reader(self) -> Connection:
        """See `connection.State`."""
        try:
            return self._connect()
        except psycopg.Error as error:
            raise self.typed(error) from error

    def release(self) -> None:
        """The lock went with the writer's session."""

    def typed(self, error: Exception) -> Exception:
        """See `connection.State`."""
        if isinstance(error, StagelineError) or not isinstance(error, psycopg.Error):
            return error
        if isinstance(error, errors.DataError):  # a zero byte in a name
            return InvalidArgumentError("TEXT_INVALID", f"a text was given that PostgreSQL cannot keep: {_line(error)}")
        if isinstance(error, errors.DiskFull):
            return disk_full(_line(error))
        # Without a code it comes from the connection itself; ReadOnlySqlTransaction comes from a standby.
        gone = isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08").startswith(("08", "57P", "533"))
        if gone or isinstance(error, errors.ReadOnlySqlTransaction):
            return StateUnreachable(
                "STATE_UNREACHABLE", f"PostgreSQL at {self._address.shown} does not answer ({_line(error)}); "
                "it is tried again and again", retry_after_s=1.0,
            )  # fmt: skip
        logger.error("batch state: %s", error, exc_info=error)
        return InternalError("STATE_FAILED", f"the batch state could not be used: {_line(error)}")

    def _connect(self) -> _Connection:
        connection = _Connection(
            psycopg.connect(**{**_DEFAULTS, **self._address.parameters}, autocommit=True, row_factory=dict_row)  # type: ignore[arg-type]
        )
        try:
            connection.execute(_SETTINGS)
            # What returned is durable, whatever the role's default; a server without fsync is its owner's choice.
            connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
            )
            return connection
        except BaseException:
            connection.close()
            raise

    def _claim(self, connection: _Connection) -> None:
        connection.execute(
            "SELECT set_config('lock_timeout', ?, false)", (f"{max(1, int(self._lock_timeout_s * 1000))}ms",)
        )
        try:
            connection.execute("SELECT pg_advisory_lock(?)", (LOCK_KEY,))
        except errors.LockNotAvailable:
            raise ConfigError(
                "STATE_IN_USE", f"batch.state_url: {self._address.shown}: another server uses it; stop that one or name "
                "another database", field="batch.state_url", url=self._address.shown,
            ) from None  # fmt: skip
        connection.execute("SELECT set_config('lock_timeout', '0', false)")
        if connection.execute("SELECT current_setting('fsync') AS fsync").fetchone()["fsync"] != "on":
            logger.warning("PostgreSQL runs with fsync off: a power failure may lose results that were counted")
        connection.execute(self.begin_write)
        self._prepare(connection)
        self._epoch = connection.execute("UPDATE owner SET epoch = epoch + 1 RETURNING epoch").fetchone()["epoch"]
        connection.execute("COMMIT")

    def _claim_again(self, connection: _Connection, epoch: int) -> None:
        locked = connection.execute("SELECT pg_try_advisory_lock(?) AS locked", (LOCK_KEY,)).fetchone()["locked"]
        if connection.execute("SELECT epoch FROM owner").fetchone()["epoch"] != epoch:
            raise StateFenced(
                "STATE_FENCED", f"another server took the batch state at {self._address.shown} over while this one had no "
                "connection to it; batches go on there, restart this server to have them here",
            )  # fmt: skip
        if not locked:
            # Our own session that PostgreSQL takes to be alive, or a server that has not counted itself yet.
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ? AND backend_start = ?",
                self._session,
            )
            raise StateUnreachable("STATE_UNREACHABLE", "the batch state's lock is not free yet", retry_after_s=1.0)

    def _prepare(self, connection: _Connection) -> None:
        found = connection.execute(
            "SELECT to_regnamespace('stageline') IS NOT NULL AS there, to_regclass('stageline.owner') IS NOT NULL AS ours,"
            " EXISTS (SELECT FROM pg_class WHERE relnamespace = to_regnamespace('stageline')) AS used"
        ).fetchone()
        if not found["there"]:
            connection.execute("CREATE SCHEMA stageline")
        if not found["used"]:
            connection.execute("CREATE TABLE owner (version INTEGER NOT NULL, epoch BIGINT NOT NULL)")
            connection.execute("INSERT INTO owner VALUES (?, 0)", (VERSION,))
            connection.execute(POSTGRES)
        elif not found["ours"] or connection.execute("SELECT version FROM owner").fetchone()["version"] != VERSION:
            raise ConfigError(
                "STATE_OF_ANOTHER_PROGRAM", f"batch.state_url: the schema stageline of {self._address.shown} holds tables that "
                "are not of this version; name another database", field="batch.state_url", url=self._address.shown,
            )  # fmt: skip


_OWN_SESSION = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"


class _Connection:
    """psycopg with SQLite's question marks."""

    def __init__(self, connection: psycopg.Connection[DictRow]) -> None:
        self._connection = connection

    @property
    def in_transaction(self) -> bool:
        status = self._connection.info.transaction_status
        return status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Rows:
        cursor = self._connection.execute(_translated(sql), parameters or None)
        if (
            sql == "COMMIT" and cursor.statusmessage != sql
        ):  # it says ROLLBACK, without an error, after one that was missed
            raise InternalError("STATE_FAILED", "PostgreSQL rolled a transaction back")
        return cursor

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> Rows:
        cursor = self._connection.cursor()
        cursor.executemany(_translated(sql), rows)
        return cursor

    def close(self) -> None:
        self._connection.close()


def _translated(sql: str) -> bytes:
    return sql.replace("?", "%s").encode()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
