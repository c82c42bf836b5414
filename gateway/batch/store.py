"""Batches and their results in the database. Functions of a connection, for `Database`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gateway.batch.connection import Connection, Row
from gateway.batch.files import drop_unused, get, result_file_id, take_page
from gateway.batch.plan import Plan
from gateway.batch.types import FINAL, Batch
from stageline.errors import FailedPreconditionError, NotFoundError


def create(
    connection: Connection, batch_id: str, plan: Plan, *, tenant: str, key: str | None, input_file_id: str,
    only_endpoint: str, window_s: int | None, metadata: dict[str, str], now_s: int,
) -> Batch:  # fmt: skip
    """The new batch with the records of the lines that cannot run, or the one that has this idempotency key.

    Raises NotFoundError where the input is gone.
    """
    if (existing := find_key(connection, tenant, key)) is not None:
        return existing
    if connection.execute("SELECT 1 FROM batches WHERE id = ?", (batch_id,)).fetchone():
        return find(connection, tenant, batch_id)  # this write runs again
    get(connection, tenant, input_file_id)
    done = len(plan.problems) == plan.total
    connection.execute(
        "INSERT INTO batches (id, tenant, idempotency_key, input_file_id, endpoint, only_endpoint, status, total, failed,"
        " created_s, window_s, completed_s, metadata) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            batch_id, tenant, key, input_file_id, plan.endpoint, only_endpoint, "completed" if done else "in_progress",
            plan.total, len(plan.problems), now_s, window_s, now_s if done else None, json.dumps(metadata),
        ),
    )  # fmt: skip
    rows = ((batch_id, line, record) for line, record in plan.problems)
    connection.executemany("INSERT INTO results VALUES (?, ?, 0, ?)", rows)
    return find(connection, tenant, batch_id)


def find(connection: Connection, tenant: str, batch_id: str) -> Batch:
    """Raises NotFoundError."""
    row = connection.execute("SELECT * FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)).fetchone()
    if row is None:
        raise NotFoundError(
            "BATCH_NOT_FOUND", f"there is no batch {batch_id[:128]!r}", field="batch_id", id=batch_id[:128]
        )
    return _batch(row)


def find_key(connection: Connection, tenant: str, key: str | None) -> Batch | None:
    """The batch with an idempotency key."""
    row = connection.execute("SELECT * FROM batches WHERE tenant = ? AND idempotency_key = ?", (tenant, key)).fetchone()
    return None if row is None else _batch(row)


def listed(connection: Connection, tenant: str, after: str, limit: int) -> tuple[list[Batch], bool]:
    """Newest first, those older than batch `after` where one is named; and whether there are more.

    Raises NotFoundError for an unknown `after`.
    """
    below = 2**62
    if after:
        find(connection, tenant, after)
        below = connection.execute("SELECT number FROM batches WHERE id = ?", (after,)).fetchone()["number"]
    rows = connection.execute(
        "SELECT * FROM batches WHERE tenant = ? AND number < ? ORDER BY number DESC LIMIT ?", (tenant, below, limit + 1)
    ).fetchall()
    return [_batch(row) for row in rows[:limit]], len(rows) > limit


def unfinished(connection: Connection) -> list[Batch]:
    """Batches with work to do, oldest first."""
    rows = connection.execute("SELECT * FROM batches WHERE status IN ('in_progress', 'cancelling') ORDER BY number")
    return [_batch(row) for row in rows]


def pending(connection: Connection, batch_id: str, after_line: int) -> list[tuple[int, bytes]]:
    """Some lines after `after_line` that have no result, in order; blank lines are among them."""
    rows = (
        "FROM batches b JOIN file_lines l ON l.file_id = b.input_file_id"
        " LEFT JOIN results r ON r.batch_id = b.id AND r.line = l.line WHERE r.line IS NULL AND b.id = ?"
    )
    return take_page(connection, "l.line", "l.data", rows, batch_id, after_line)


def add_result(connection: Connection, batch_id: str, line: int, record: bytes, *, ok: bool, now_s: int) -> bool:
    """Keep a record, count it, and end the batch with its last one, all or nothing.

    False where the line has a record already or the batch has ended: nothing changes then.
    """
    # Two statements, not more: where the database is another host each is a trip, and the writer makes them for every line.
    added = connection.execute(
        "INSERT INTO results SELECT id, ?, ?, ? FROM batches WHERE id = ? AND status IN ('in_progress', 'cancelling')"
        " ON CONFLICT DO NOTHING",
        (line, int(ok), record, batch_id),
    ).rowcount
    if not added:
        return False
    column = "completed" if ok else "failed"
    last = "completed + failed + 1 = total"
    connection.execute(
        f"UPDATE batches SET {column} = {column} + 1, status = CASE WHEN {last} THEN 'completed' ELSE status END,"
        f" completed_s = CASE WHEN {last} THEN ? ELSE completed_s END WHERE id = ?",
        (now_s, batch_id),
    )
    return True


def cancel(connection: Connection, tenant: str, batch_id: str, now_s: int) -> Batch:
    """Begin to cancel. Raises NotFoundError, and FailedPreconditionError for a batch that has ended."""
    batch = find(connection, tenant, batch_id)
    if batch.status in FINAL and batch.status != "cancelled":
        raise FailedPreconditionError(
            "BATCH_ENDED", f"{batch_id} is {batch.status}; only a batch that runs can be cancelled",
            field="batch_id", status=batch.status,
        )  # fmt: skip
    connection.execute(
        "UPDATE batches SET status = 'cancelling', cancelling_s = ? WHERE id = ? AND status = 'in_progress'",
        (now_s, batch_id),
    )
    return find(connection, tenant, batch_id)


def end_cancelled(connection: Connection, batch_id: str, now_s: int) -> None:
    """Nothing of it runs any more."""
    connection.execute(
        "UPDATE batches SET status = 'cancelled', cancelled_s = ? WHERE id = ? AND status = 'cancelling'",
        (now_s, batch_id),
    )


def end_expired(connection: Connection, batch_id: str, records: Sequence[tuple[int, bytes]], now_s: int) -> None:
    """End with an error record for every line that has not run."""
    rows = ((batch_id, line, record) for line, record in records)
    added = connection.executemany("INSERT INTO results VALUES (?, ?, 0, ?) ON CONFLICT DO NOTHING", rows).rowcount
    connection.execute(
        "UPDATE batches SET status = 'expired', expired_s = ?, failed = failed + ? WHERE id = ?",
        (now_s, max(0, added), batch_id),
    )


def delete(connection: Connection, tenant: str, batch_id: str) -> None:
    """Forget a batch, its results, and its input where no other batch has it.

    Raises NotFoundError, and FailedPreconditionError for a batch that runs.
    """
    batch = find(connection, tenant, batch_id)
    if batch.status not in FINAL:
        raise FailedPreconditionError(
            "BATCH_RUNNING", f"{batch_id} is {batch.status}; cancel it before it is deleted",
            field="batch_id", status=batch.status,
        )  # fmt: skip
    connection.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))
    connection.execute("DELETE FROM batches WHERE id = ?", (batch_id,))
    drop_unused(connection, batch.input_file_id)


def _batch(row: Row) -> Batch:
    ended = row["status"] in FINAL
    names = ("id", "input_file_id", "endpoint", "status", "total", "completed", "failed", "created_s", "window_s",
             "completed_s", "cancelling_s", "cancelled_s", "expired_s", "tenant")  # fmt: skip
    return Batch(
        **{name: row[name] for name in names},
        output_file_id=result_file_id(row["id"], "output") if ended and row["completed"] and row["has_output"] else "",
        error_file_id=result_file_id(row["id"], "error") if ended and row["failed"] and row["has_errors"] else "",
        metadata=json.loads(row["metadata"]),
    )
