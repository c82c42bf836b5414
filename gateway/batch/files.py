"""Input files in the database, and the results of batches as files. Functions of a connection, for `Database`."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.batch.connection import Connection, Row
from gateway.batch.types import ResultKind, StoredFile
from stageline.errors import FailedPreconditionError, NotFoundError

PAGE_BYTES, PAGE_LINES = 2**20, 4096
_SUFFIXES: dict[str, ResultKind] = {"-output": "output", "-error": "error"}


def result_file_id(batch_id: str, kind: ResultKind) -> str:
    """The name under which a batch's results of one kind are read."""
    return f"file-{batch_id.removeprefix('batch_')}-{kind}"


def begin(connection: Connection, tenant: str, file_id: str, filename: str, now_s: int) -> None:
    """A file that is not complete yet."""
    connection.execute(
        "INSERT INTO files (id, tenant, filename, created_s) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (file_id, tenant, filename, now_s),
    )


def append(connection: Connection, file_id: str, first_line: int, lines: Sequence[bytes]) -> None:
    """Add lines, numbered from `first_line`."""
    rows = ((file_id, first_line + place, line) for place, line in enumerate(lines))
    connection.executemany("INSERT INTO file_lines VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)


def complete(
    connection: Connection, tenant: str, file_id: str, first_line: int, rest: Sequence[bytes], num_bytes: int
) -> StoredFile:
    """Add the last lines; from now on the file is there, and never changes."""
    append(connection, file_id, first_line, rest)
    connection.execute("UPDATE files SET complete = 1, num_bytes = ? WHERE id = ?", (num_bytes, file_id))
    return get(connection, tenant, file_id)


def drop(connection: Connection, file_id: str) -> None:
    """Forget an input file, whoever needs it."""
    connection.execute("DELETE FROM file_lines WHERE file_id = ?", (file_id,))
    connection.execute("DELETE FROM files WHERE id = ?", (file_id,))


def drop_incomplete(connection: Connection) -> None:
    """Forget uploads that a server's end cut off."""
    for row in connection.execute("SELECT id FROM files WHERE complete = 0").fetchall():
        drop(connection, row["id"])


def drop_unused(connection: Connection, file_id: str) -> None:
    """Forget an input file that no batch names."""
    if connection.execute("SELECT 1 FROM batches WHERE input_file_id = ?", (file_id,)).fetchone() is None:
        drop(connection, file_id)


def get(connection: Connection, tenant: str, file_id: str) -> StoredFile:
    """Raises NotFoundError."""
    source = _result_source(connection, tenant, file_id)
    if source is not None:
        batch, kind = source
        num_bytes = connection.execute(
            "SELECT coalesce(sum(length(record)), 0) AS num_bytes FROM results WHERE batch_id = ? AND ok = ?",
            (batch["id"], int(kind == "output")),
        ).fetchone()["num_bytes"]
        ended_s = batch["completed_s"] or batch["cancelled_s"] or batch["expired_s"]
        name = f"{batch['id']}_{kind}.jsonl"
        return StoredFile(
            id=file_id, filename=name, num_bytes=num_bytes, created_s=ended_s, purpose="batch_output"
        )  # fmt: skip
    row = connection.execute(
        "SELECT * FROM files WHERE id = ? AND tenant = ? AND complete = 1", (file_id, tenant)
    ).fetchone()
    if row is None:
        raise NotFoundError("FILE_NOT_FOUND", f"there is no file {file_id[:128]!r}", field="file_id", id=file_id[:128])
    return _stored(row)


def input_files(connection: Connection, tenant: str) -> list[StoredFile]:
    """All uploaded files, newest first."""
    rows = connection.execute(
        "SELECT * FROM files WHERE tenant = ? AND complete = 1 ORDER BY created_s DESC, rowid DESC", (tenant,)
    )
    return [_stored(row) for row in rows]


def page(connection: Connection, tenant: str, file_id: str, after_line: int) -> list[tuple[int, bytes]]:
    """Some (line, bytes) after a line, about PAGE_BYTES of them; none at the end. Raises NotFoundError."""
    source = _result_source(connection, tenant, file_id)
    if source is not None:
        return results_page(connection, source[0]["id"], source[1], after_line)
    get(connection, tenant, file_id)
    return take_page(connection, "line", "data", "FROM file_lines WHERE file_id = ?", file_id, after_line)


def results_page(connection: Connection, batch_id: str, kind: ResultKind, after_line: int) -> list[tuple[int, bytes]]:
    """As `page`, of a batch that may still run."""
    rows = f"FROM results WHERE ok = {int(kind == 'output')} AND batch_id = ?"
    return take_page(connection, "line", "record", rows, batch_id, after_line)


def take_page(
    connection: Connection, line: str, data: str, rows: str, owner: str, after_line: int
) -> list[tuple[int, bytes]]:
    """About PAGE_BYTES of (line, bytes) after a line, at least one where there is one.

    `line` and `data`: columns of `rows`, which ends with a condition on `owner`. Sizes come first: not every database hands out
    rows one by one.
    """
    order = f"ORDER BY {line} LIMIT {PAGE_LINES}"
    sizes = connection.execute(
        f"SELECT {line} AS line, length({data}) AS size {rows} AND {line} > ? {order}", (owner, after_line)
    )
    last, num_bytes = after_line, 0
    for row in sizes.fetchall():
        last, num_bytes = row["line"], num_bytes + row["size"]
        if num_bytes >= PAGE_BYTES:
            break
    taken = connection.execute(
        f"SELECT {line} AS line, {data} AS data {rows} AND {line} > ? AND {line} <= ? {order}",
        (owner, after_line, last),
    )
    return [(row["line"], row["data"]) for row in taken.fetchall()]


def delete(connection: Connection, tenant: str, file_id: str) -> None:
    """Delete for a client. Raises NotFoundError, and FailedPreconditionError for the input of a batch that runs."""
    source = _result_source(connection, tenant, file_id)
    if source is not None:
        batch, kind = source
        connection.execute("DELETE FROM results WHERE batch_id = ? AND ok = ?", (batch["id"], int(kind == "output")))
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


def _result_source(connection: Connection, tenant: str, file_id: str) -> tuple[Row, ResultKind] | None:
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


def _stored(row: Row) -> StoredFile:
    return StoredFile(
        id=row["id"], filename=row["filename"], num_bytes=row["num_bytes"], created_s=row["created_s"], tenant=row["tenant"]
    )  # fmt: skip
