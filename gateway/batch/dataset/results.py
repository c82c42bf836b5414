"""The journals of all shards as one output and one error file, in the order of the input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from gateway.batch.dataset.journal import Record, done_shards, read_done
from gateway.batch.dataset.plan import Plan
from gateway.batch.dataset.storage import Place
from stageline.errors import InternalError

ROWS_A_GROUP = 4096


def write_results(plan: Plan, journals: Place, output: Place, errors: Place) -> tuple[int, int]:
    """Replace both files, each in one piece; returns (completed, failed).

    An output named .parquet has the columns id, custom_id, status_code, request_id, body (JSON text); any other is OpenAI's
    JSON lines, which errors always are. Raises InternalError where a request has no record, and what `Place.writing` raises.
    """
    completed = failed = 0
    with output.writing() as out, errors.writing() as bad:
        table = _Table(out) if output.url.endswith(".parquet") else None
        for record in _records(plan, journals):
            if not record.ok:
                failed += 1
                bad.write(record.line)
                continue
            completed += 1
            if table is None:
                out.write(record.line)
            else:
                table.add(record.line)
        if table is not None:
            table.close()
    return completed, failed


def _records(plan: Plan, journals: Place) -> Iterator[Record]:
    done, number = done_shards(journals), 0
    for index, shard in enumerate(plan.shards):
        if not shard.num_requests:
            continue
        records = read_done(journals, done[index][0]) if index in done else []
        wanted = range(number + 1, number + 1 + shard.num_requests)
        if [at for at, _ in records] != list(wanted):
            raise InternalError(
                "RESULTS_INCOMPLETE", f"{journals.url} lacks results of shard {index}; run the job again"
            )
        number += shard.num_requests
        yield from (record for _, record in records)


class _Table:
    """Rows of a Parquet file, written in groups."""

    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.string()
        self._schema = pyarrow.schema(
            {"id": text, "custom_id": text, "status_code": pyarrow.int32(), "request_id": text, "body": text}
        )
        self._pyarrow, self._writer = pyarrow, pyarrow.parquet.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, line: bytes) -> None:
        """A line of the output file."""
        fields = json.loads(line)
        response = fields["response"]
        self._rows.append(
            {
                "id": fields["id"],
                "custom_id": fields["custom_id"],
                "status_code": response["status_code"],
                "request_id": response["request_id"],
                "body": json.dumps(response["body"], ensure_ascii=False, separators=(",", ":")),
            }
        )
        if len(self._rows) == ROWS_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the footer."""
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(self._pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []
