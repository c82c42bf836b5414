"""OpenAI's objects: a line of the output or error file, a batch, a file. Pure."""

from __future__ import annotations

import json
from typing import Any

from gateway.api.http.errors import error_object
from gateway.batch.types import Batch, StoredFile
from stageline.errors import StagelineError

UNLIMITED = "unlimited"
# Line ends to some readers, such as Python's str.splitlines, but not to JSON: they stand in strings only.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def line_record(
    batch_id: str, number: int, custom_id: str | None, *, body: dict[str, Any] | None = None,
    error: StagelineError | None = None, ran: bool = False, status: int = 200, line: int | None = None,
) -> bytes:  # fmt: skip
    """One line, with its line feed: the answer's `body` under its HTTP `status`, or the `error` of a request that `ran` or
    of one that did not (its `line`: `number` unless given).

    As in OpenAI's files: what ran has a `response` with the status the HTTP door would have sent, what did not has an
    `error`.
    """
    response: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    request_id = f"{batch_id}-{number}"
    if error is None:
        response = {"status_code": status, "request_id": request_id, "body": body}
    elif ran:
        response = {"status_code": error.http_status, "request_id": request_id, "body": error_object(error)}
    else:
        problem = {"code": error.reason.lower(), "message": error.message, "line": line or number}
    record = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{number}",
        "custom_id": custom_id,
        "response": response,
        "error": problem,
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def batch_object(batch: Batch) -> dict[str, Any]:
    """OpenAI's batch object."""
    hours = None if batch.window_s is None else batch.window_s // 3600
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": None,
        "input_file_id": batch.input_file_id,
        "completion_window": UNLIMITED if hours is None else f"{hours}h",
        "status": batch.status,
        "output_file_id": batch.output_file_id or None,
        "error_file_id": batch.error_file_id or None,
        "created_at": batch.created_s,
        "in_progress_at": batch.created_s,
        "expires_at": batch.expires_s,
        "finalizing_at": batch.completed_s,
        "completed_at": batch.completed_s,
        "failed_at": None,
        "expired_at": batch.expired_s,
        "cancelling_at": batch.cancelling_s,
        "cancelled_at": batch.cancelled_s,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": dict(batch.metadata) or None,
    }


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_s,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": None,
    }
