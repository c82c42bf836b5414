"""What a shard's requests came to, durable as they end: small parts, put together when the shard is done.

A record is `NUMBER 0|1 JSON`, one a line: the dataset's request from 1, whether it was answered, its line of the output or
error file. Two runs of one shard, of which one was taken for dead, may both write: of a request's records the first counts.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gateway.batch.dataset.storage import Place

_DONE = ".done"


@dataclass(frozen=True, slots=True)
class Record:
    """`line` has its line feed."""

    ok: bool
    line: bytes


class ShardJournal:
    """The parts of one run of one shard, and those that earlier runs left."""

    def __init__(self, folder: Place, index: int) -> None:
        self._folder, self._index = folder, index
        self._parts = folder / f"{index:06d}"
        self._run, self._num_parts = secrets.token_hex(4), 0

    def finished(self) -> dict[int, Record]:
        """Number → record of all that is durable."""
        records: dict[int, Record] = {}
        for name in self._parts.names():
            for number, record in _records((self._parts / name).read() or b""):
                records.setdefault(number, record)
        return records

    def add(self, records: Mapping[int, Record]) -> None:
        """Returns once they are durable. Raises what `Place.write` raises."""
        (self._parts / f"{self._run}-{self._num_parts:06d}").write(_bytes(records))
        self._num_parts += 1

    def finish(self, records: Mapping[int, Record]) -> None:
        """All of the shard's: one file instead of the parts."""
        failed = sum(not record.ok for record in records.values())
        (self._folder / f"{self._index:06d}-{len(records) - failed}-{failed}{_DONE}").write(_bytes(records))
        self._parts.remove()


def done_shards(folder: Place) -> dict[int, tuple[str, int, int]]:
    """Shard → (name of its file, completed, failed)."""
    found: dict[int, tuple[str, int, int]] = {}
    for name in folder.names():
        if name.endswith(_DONE):
            index, completed, failed = map(int, name.removesuffix(_DONE).split("-"))
            found.setdefault(index, (name, completed, failed))
    return found


def read_done(folder: Place, name: str) -> list[tuple[int, Record]]:
    """The records of a shard that is done, in the order of the input."""
    return sorted(_records((folder / name).read() or b""), key=lambda item: item[0])


def _bytes(records: Mapping[int, Record]) -> bytes:
    return b"".join(b"%d %d %s" % (number, one.ok, one.line) for number, one in sorted(records.items()))


def _records(data: bytes) -> Iterator[tuple[int, Record]]:
    for line in data.split(b"\n")[:-1]:
        number, ok, text = line.split(b" ", 2)
        yield int(number), Record(ok == b"1", text + b"\n")
