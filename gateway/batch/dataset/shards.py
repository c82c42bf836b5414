"""A dataset cut into shards that are read alone: byte ranges of JSON lines, rows of one row group of Parquet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.batch.dataset.storage import Place, unreadable
from gateway.batch.lines import MAX_LINE_BYTES, LineProblem, LineRequest, is_blank, read_line
from stageline.errors import ConfigError, InvalidArgumentError

MIN_SHARD_BYTES = 256 << 10
MAX_SHARDS = 4096  # of JSON lines: one task each, so not too many
SHARD_ROWS = 1024
COLUMNS = ("custom_id", "url", "body")  # of Parquet; `method` may be there too

Row = tuple[int, LineRequest | LineProblem]  # (line or row of the file from 1, what stands there)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """`start` to `end`: bytes in which its lines begin, or rows within `row_group`. What follows is known after the scan:
    the file's line or row, and the dataset's request, before the first of it; how many requests; a digest of them."""

    url: str
    start: int
    end: int
    row_group: int | None = None
    lines_before: int = 0
    requests_before: int = 0
    num_requests: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Scan:
    """`ids`: 16 bytes for each custom_id, in order."""

    num_lines: int
    num_requests: int
    sha256: str
    ids: bytes


def cut(files: Sequence[tuple[str, int, str]]) -> list[Shard]:
    """Shards of (URL, bytes, version), in order. Raises ConfigError for Parquet that lacks a column or is damaged."""
    step = max(MIN_SHARD_BYTES, -(-sum(size for _, size, _ in files) // MAX_SHARDS))
    shards: list[Shard] = []
    for url, size, _ in files:
        if url.endswith(".parquet"):
            shards += _cut_parquet(url)
        else:
            shards += [Shard(url=url, start=at, end=min(size, at + step)) for at in range(0, size, step)]
    return shards


def _cut_parquet(url: str) -> list[Shard]:
    shards, rows_before = [], 0
    with _parquet(url) as file:
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ConfigError(
                "COLUMN_MISSING", f"{url} lacks the columns {', '.join(missing)}; expected {', '.join(COLUMNS)}",
                field="input", url=url,
            )  # fmt: skip
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            for start in range(0, rows, SHARD_ROWS):
                end = min(rows, start + SHARD_ROWS)
                shards.append(Shard(url=url, start=start, end=end, row_group=group, lines_before=rows_before + start))
            rows_before += rows
    return shards


def scan(shard: Shard) -> Scan:
    """Read the shard once. Raises ConfigError where it cannot be read."""
    digest, ids = hashlib.sha256(), bytearray()
    num_lines = num_requests = 0
    for _, line in _lines(shard, shard.lines_before):
        num_lines += 1
        digest.update(line if isinstance(line, bytes) else b"\0too long\n")
        if isinstance(line, bytes) and is_blank(line):
            continue
        num_requests += 1
        # Only a file's first line may begin with a byte order mark, so which later line it is does not matter yet.
        read = read_line(line, 2 if shard.start else num_lines, "") if isinstance(line, bytes) else line
        if read.custom_id is not None:
            ids += hashlib.blake2b(read.custom_id.encode(), digest_size=16).digest()
    return Scan(num_lines, num_requests, digest.hexdigest(), bytes(ids))


def with_scans(shards: Sequence[Shard], scans: Sequence[Scan]) -> list[Shard]:
    """The shards, with what the scans found."""
    out, requests, lines, url = [], 0, 0, ""
    for shard, found in zip(shards, scans, strict=True):
        lines, url = (lines if shard.url == url else 0), shard.url
        shard = replace(shard, lines_before=lines, requests_before=requests)
        out.append(replace(shard, num_requests=found.num_requests, sha256=found.sha256))
        lines += found.num_lines
        requests += found.num_requests
    return out


def read(shard: Shard) -> list[Row]:
    """What stands in a scanned shard, without blank lines. Raises ConfigError where it is not what was scanned."""
    digest, rows = hashlib.sha256(), list[Row]()
    for number, line in _lines(shard, shard.lines_before):
        digest.update(line if isinstance(line, bytes) else b"\0too long\n")
        if not isinstance(line, bytes):
            rows.append((number, line))
        elif not is_blank(line):
            rows.append((number, read_line(line, number, "")))
    if digest.hexdigest() != shard.sha256:
        raise ConfigError(
            "INPUT_CHANGED", f"{shard.url} changed while its batch runs; name another --output-file", field="input"
        )
    return rows


def _lines(shard: Shard, before: int) -> Iterator[tuple[int, bytes | LineProblem]]:
    found = _json_lines(shard) if shard.row_group is None else _parquet_lines(shard)
    for number, line in enumerate(found, before + 1):
        yield number, (line if line is not None else _too_long(number))


def _too_long(number: int) -> LineProblem:
    text = f"line {number} has over {MAX_LINE_BYTES} bytes; shorten its body"
    return LineProblem(None, InvalidArgumentError("LINE_TOO_LONG", text, line=number, limit=MAX_LINE_BYTES))


def _json_lines(shard: Shard) -> Iterator[bytes | None]:
    """Lines that begin within the shard; None for one that is too long."""
    fs, path = Place(shard.url).open()
    try:
        with fs.open(path, "rb") as raw:
            file = io.BufferedReader(raw) if not isinstance(raw, io.BufferedIOBase) else raw
            position = max(0, shard.start - 1)
            file.seek(position)
            if shard.start:  # the rest of a line that began before, or the line feed that ended it
                position += _next_line(file)[1]
            while position < shard.end:
                line, length = _next_line(file)
                if not length:
                    return
                position += length
                yield line
    except OSError as error:
        raise unreadable(shard.url, error) from None


def _next_line(file: Any) -> tuple[bytes | None, int]:
    """(the next line, None where it is too long; its bytes, 0 at the end of the file)."""
    line = piece = file.readline(MAX_LINE_BYTES)
    length = len(line)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(MAX_LINE_BYTES)
        length += len(piece)
    return (line if length == len(line) else None), length


def _parquet_lines(shard: Shard) -> Iterator[bytes]:
    at = 0
    with _parquet(shard.url) as file:
        names = [name for name in (*COLUMNS, "method") if name in file.schema_arrow.names]
        for batch in file.iter_batches(SHARD_ROWS, row_groups=[shard.row_group], columns=names):
            if at + len(batch) > shard.start:
                first = max(0, shard.start - at)
                for row in batch.slice(first, min(len(batch), shard.end - at) - first).to_pylist():
                    yield _json_line(row)
            at += len(batch)
            if at >= shard.end:
                return


def _json_line(row: dict[str, Any]) -> bytes:
    """The row as a line of a batch file. A body in text that is not JSON stays text, and is refused as such."""
    body = row["body"]
    if isinstance(body, str | bytes):
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(body)
    line = {**row, "method": row.get("method") or "POST", "body": _without_nulls(body)}
    return json.dumps(line, default=str).encode() + b"\n"


def _without_nulls(value: Any) -> Any:
    # A struct has every field of its column in every row.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet(url: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    fs, path = Place(url).open()
    try:
        return pyarrow.parquet.ParquetFile(fs.open(path, "rb"))
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError("INPUT_UNREADABLE", f"cannot read {url} as Parquet: {error}", url=url) from None
