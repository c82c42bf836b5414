"""What moves between doors, store and worker. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["in_progress", "completed", "cancelling", "cancelled", "expired"]
FINAL: frozenset[Status] = frozenset(("completed", "cancelled", "expired"))

ResultKind = Literal["output", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as clients see it. Times are seconds since the epoch. `purpose`: batch or batch_output."""

    id: str
    filename: str
    num_bytes: int
    created_s: int
    purpose: str = "batch"
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch at one moment. Times are seconds since the epoch, None where it did not happen.

    `total` counts the lines of the input that are not empty; `completed` and `failed` those whose record is durable.
    `window_s`: seconds from creation to expiry, None without one. `output_file_id` and `error_file_id` are empty while
    the batch runs and where no line of that kind came out.
    """

    id: str
    input_file_id: str
    endpoint: str
    status: Status
    total: int
    completed: int = 0
    failed: int = 0
    created_s: int
    window_s: int | None = None
    completed_s: int | None = None
    cancelling_s: int | None = None
    cancelled_s: int | None = None
    expired_s: int | None = None
    output_file_id: str = ""
    error_file_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""

    @property
    def expires_s(self) -> int | None:
        """When what has not run is given up."""
        return None if self.window_s is None else self.created_s + self.window_s
