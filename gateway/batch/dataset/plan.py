"""What a dataset job is to do, and where it stands: one small file beside the output, which a job started again reads. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gateway.batch.dataset.shards import Shard
from stageline.errors import ConfigError

VERSION = 1

Files = tuple[tuple[str, int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`files`: (URL, bytes, version) of the input when it was read. Counts are those of a job that has ended."""

    batch_id: str
    fingerprint: str
    files: Files
    shards: tuple[Shard, ...]
    ended: bool = False
    completed: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """Requests, lines that cannot run among them."""
        return sum(shard.num_requests for shard in self.shards)


def new_plan(files: Files, shards: Sequence[Shard]) -> Plan:
    """The plan of scanned shards. Raises ConfigError for a dataset without requests."""
    fingerprint = fingerprint_of(shards)
    plan = Plan(batch_id=f"batch_{fingerprint[:24]}", fingerprint=fingerprint, files=files, shards=tuple(shards))
    if not plan.total:
        raise ConfigError("INPUT_EMPTY", "the input holds no request; expected one a line", field="input")
    return plan


def fingerprint_of(shards: Sequence[Shard]) -> str:
    """Of all that was read, by content and name."""
    text = json.dumps([[shard.url, shard.start, shard.end, shard.sha256] for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(plan: Plan) -> bytes:
    """What `from_json` reads."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(plan)}).encode()


def from_json(data: bytes, url: str) -> Plan:
    """Raises ConfigError for a file that is not ours or of another version."""
    try:
        fields = json.loads(data)
        if fields.pop("version") != VERSION:
            raise ValueError
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        fields["files"] = tuple((name, size, version) for name, size, version in fields["files"])
        return Plan(**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            "STATE_OF_ANOTHER_PROGRAM",
            f"{url} is not of this version; name another --output-file, or remove it",
            url=url,
        ) from None


def next_step(
    plan: Plan | None, files: Files, fingerprint: str | None, *, results_exist: bool
) -> Literal["scan", "begin", "resume", "done"]:
    """What to do with the `plan` that was found. `fingerprint`: of the input, None while it has not been read; `scan` asks
    for it.

    Raises ConfigError where the input is another one than that of a job which has not ended.
    """
    if plan is None or (plan.ended and not results_exist):
        return "begin" if fingerprint is not None else "scan"
    if plan.files != files:
        if fingerprint is None:
            return "scan"
        if plan.fingerprint != fingerprint:
            if plan.ended:
                return "begin"
            raise ConfigError(
                "INPUT_CHANGED",
                "the input is not the one that the job of this --output-file began with, and that job has not ended; "
                "name another --output-file, or remove the folder with its state to begin anew",
                field="input",
            )
    return "done" if plan.ended else "resume"


def duplicates(ids: Sequence[bytes], limit: int) -> tuple[int, list[tuple[int, int]]]:
    """How many custom_ids stand again after their first place, and the first `limit` of them as (first place, again).

    `ids`: for each shard 16 bytes a custom_id; a place counts custom_ids from 0 over all shards.
    """
    pairs = np.frombuffer(b"".join(ids), dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: equal ones stay in the order of their places
    ordered = pairs[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
    if not len(again):
        return 0, []
    groups = np.cumsum(np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])) - 1
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    found = sorted((int(order[at]), int(order[starts[groups[at]]])) for at in again)
    return len(found), [(first, second) for second, first in found[:limit]]
