"""Input files in the database, and the results of batches as files. Functions of a connection, for `Database`."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from gateway.batch.types import ResultKind, StoredFile
from stageline.errors import FailedPreconditionError, NotFoundError

PAGE_BYTES = 2**20
_SUFFIXES: dict[str, ResultKind] = {"-output": "output", "-error": "error"}


def result_file_id(batch_id: str, kind: ResultKind) -> str:
    """The name under which a batch's results of one kind are read."""
    return f"file-{batch_id.removeprefix('batch_')}-{kind}"


def begin(connection: sqlite3.Connection, tenant: str, file_id: str, filename: str, now_s: int) -> None:
    """A file that is not complete yet."""
    connection.execute(
        "INSERT INTO files (id, tenant, filename, created_s) VALUES (?, ?, ?, ?)", (file_id, tenant, filename, now_s)
    )


def append(connection: sqlite3.Connection, file_id: str, first_line: int, lines: Sequence[bytes]) -> None:
    """Add lines, numbered from `first_line`."""
    rows = ((file_id, first_line + place, line) for place, line in enumerate(lines))
    connection.executemany("INSERT INTO file_lines VALUES (?, ?, ?)", rows)


def complete(connection: sqlite3.Connection, tenant: str, file_id: str, num_bytes: int) -> StoredFile:
    """From now on the file is there, and never changes."""
    connection.execute("UPDATE files SET complete = 1, num_bytes = ? WHERE id = ?", (num_bytes, file_id))
    return get(connection, tenant, file_id)


def drop(connection: sqlite3.Connection, file_id: str) -> None:
    """Forget an input file, whoever needs it."""
    connection.execute("DELETE FROM file_lines WHERE file_id = ?", (file_id,))
    connection.execute("DELETE FROM files WHERE id = ?", (file_id,))


def drop_incomplete(connection: sqlite3.Connection) -> None:
    """Forget uploads that a server's end cut off."""
    for row in connection.execute("SELECT id FROM files WHERE NOT complete").fetchall():
        drop(connection, row["id"])


def drop_unused(connection: sqlite3.Connection, file_id: str) -> None:
    """Forget an input file that no batch names."""
    if connection.execute("SELECT 1 FROM batches WHERE input_file_id = ?", (file_id,)).fetchone() is None:
        drop(connection, file_id)


def get(connection: sqlite3.Connection, tenant: str, file_id: str) -> StoredFile:
    """Raises NotFoundError."""
    source = _result_source(connection, tenant, file_id)
    if source is not None:
        batch, kind = source
        num_bytes = connection.execute(
            "SELECT coalesce(sum(length(record)), 0) FROM results WHERE batch_id = ? AND ok = ?",
            (batch["id"], kind == "output"),
        ).fetchone()[0]
        ended_s = batch["completed_s"] or batch["cancelled_s"] or batch["expired_s"]
        name = f"{batch['id']}_{kind}.jsonl"
        return StoredFile(
            id=file_id, filename=name, num_bytes=num_bytes, created_s=ended_s, purpose="batch_output"
        )  # fmt: skip
    row = connection.execute(
        "SELECT * FROM files WHERE id = ? AND tenant = ? AND complete", (file_id, tenant)
    ).fetchone()
    if row is None:
        raise NotFoundError("FILE_NOT_FOUND", f"there is no file {file_id[:128]!r}", field="file_id", id=file_id[:128])
    return _stored(row)


def input_files(connection: sqlite3.Connection, tenant: str) -> list[StoredFile]:
    """All uploaded files, newest first."""
    rows = connection.execute(
        "SELECT * FROM files WHERE tenant = ? AND complete ORDER BY created_s DESC, rowid DESC", (tenant,)
    )
    return [_stored(row) for row in rows]


def page(connection: sqlite3.Connection, tenant: str, file_id: str, after_line: int) -> list[tuple[int, bytes]]:
    """Some (line, bytes) after a line, about PAGE_BYTES of them; none at the end. Raises NotFoundError."""
    source = _result_source(connection, tenant, file_id)
    if source is not None:
        return results_page(connection, source[0]["id"], source[1], after_line)
    get(connection, tenant, file_id)
    rows = connection.execute(
        "SELECT line, data FROM file_lines WHERE file_id = ? AND line > ? ORDER BY line", (file_id, after_line)
    )
    return take_page(rows)


def results_page(
    connection: sqlite3.Connection, batch_id: str, kind: ResultKind, after_line: int
) -> list[tuple[int, bytes]]:
    """As `page`, of a batch that may still run."""
    rows = connection.execute(
        "SELECT line, record FROM results WHERE batch_id = ? AND ok = ? AND line > ? ORDER BY line",
        (batch_id, kind == "output", after_line),
    )
    return take_page(rows)


def take_page(rows: sqlite3.Cursor) -> list[tuple[int, bytes]]:
    """About PAGE_BYTES of (line, bytes), at least one where there is one."""
    taken, num_bytes = [], 0
    for line, data in rows:
        taken.append((line, data))
        num_bytes += len(data)
        if num_bytes >= PAGE_BYTES:
            break
    rows.close()  # ends the read transaction
    return taken


def delete(connection: sqlite3.Connection, tenant: str, file_id: str) -> None:
    """Delete for a client. Raises NotFoundError, and FailedPreconditionError for the input of a batch that runs."""
    source = _result_source(connection, tenant, file_id)
    if source is not None:
        batch, kind = source
        connection.execute("DELETE FROM results WHERE batch_id = ? AND ok = ?", (batch["id"], kind == "output"))
        column = "has_output" if kind == "output" else "has_errors"
        connection.execute(f"UPDATE batches SET {column} = 0 WHERE id = ?", (batch["id"],))
        return
    get(connection, tenant, file_id)
    running = connection.execute(
        "SELECT id FROM batches WHERE input_file_id = ? AND status IN ('in_progress', 'cancelling')", (file_id,)
    ).fetchone()
    if running is not None:
        raise FailedPreconditionError(
            "FILE_IN_USE", f"file {file_id} is the input of {running['id']}, which runs; cancel that first",
            field="file_id", batch=running["id"],
        )  # fmt: skip
    drop(connection, file_id)


def _result_source(connection: sqlite3.Connection, tenant: str, file_id: str) -> tuple[sqlite3.Row, ResultKind] | None:
    """The batch and kind behind the name of a result file that exists."""
    for suffix, kind in _SUFFIXES.items():
        if file_id.endswith(suffix):
            batch_id = "batch_" + file_id.removeprefix("file-").removesuffix(suffix)
            row = connection.execute(
                "SELECT * FROM batches WHERE id = ? AND tenant = ? AND status IN ('completed', 'cancelled', 'expired')",
                (batch_id, tenant),
            ).fetchone()
            there = row is not None and (
                row["completed"] and row["has_output"] if kind == "output" else row["failed"] and row["has_errors"]
            )
            return (row, kind) if there else None
    return None


def _stored(row: sqlite3.Row) -> StoredFile:
    return StoredFile(
        id=row["id"], filename=row["filename"], num_bytes=row["num_bytes"], created_s=row["created_s"], tenant=row["tenant"]
    )  # fmt: skip
