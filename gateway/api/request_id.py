"""The name of the request being served, for log lines and errors: the client's own, or one drawn at the door."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from stageline.errors import InvalidArgumentError

HEADER = "x-request-id"
MAX_CHARS = 128
_ALLOWED = re.compile(r"[\x21-\x7e]{1,128}")

current: ContextVar[str] = ContextVar("request_id", default="")


def new_request_id() -> str:
    """32 hexadecimal digits."""
    return uuid.uuid4().hex


def check_request_id(value: str, field: str = HEADER) -> str:
    """The name, unchanged. Raises InvalidArgumentError: names stand in headers and log lines."""
    if _ALLOWED.fullmatch(value) is None:
        raise InvalidArgumentError(
            "REQUEST_ID_INVALID",
            f"{field} must be 1 to {MAX_CHARS} printable ASCII characters without spaces, got {value[:32]!r} "
            f"({len(value)} characters)",
            field=field, length=len(value), limit=MAX_CHARS,
        )  # fmt: skip
    return value
