"""The error tree of Stageline.

StagelineError
├── InvalidArgumentError     the request is wrong whatever the state of the server (INVALID_ARGUMENT, HTTP 400)
│   ├── ConfigError          a flag, an environment variable or a configuration file is wrong
│   └── CheckpointError      a checkpoint is incomplete, damaged or of an unknown architecture
├── UnauthenticatedError     no valid credentials (UNAUTHENTICATED, HTTP 401)
├── PermissionDeniedError    known, but not allowed to do that (PERMISSION_DENIED, HTTP 403)
├── NotFoundError            no such model (NOT_FOUND, HTTP 404)
├── FailedPreconditionError  right request, wrong state: other fingerprint, stale epoch (FAILED_PRECONDITION, HTTP 400)
├── ResourceExhaustedError   queue or memory is full, come back later (RESOURCE_EXHAUSTED, HTTP 429)
├── UnimplementedError       a documented field that this version does not serve (UNIMPLEMENTED, HTTP 400)
├── DeadlineExceededError    the deadline passed before the request ended (DEADLINE_EXCEEDED, HTTP 504)
├── UnavailableError         no pipeline can serve now, retry (UNAVAILABLE, HTTP 503)
└── InternalError            our own failure (INTERNAL, HTTP 500)

Every error has a `reason` (UPPER_SNAKE, stable, for programs), a message for people (what was wrong, what was
expected, what to do) and `metadata` with every variable of the message. The doors turn it into a gRPC status with
`ErrorInfo`, an OpenAI error object, or one line on stderr and exit code 2.
"""

from __future__ import annotations

from typing import ClassVar

DOMAIN = "stageline.dev"


class StagelineError(Exception):
    """Base of every error that a caller of Stageline can meet.

    `reason` is UPPER_SNAKE and stable. Metadata values are made strings; None is left out. `field` in the metadata
    names the offending request or configuration field, where there is one.
    """

    code: ClassVar[str] = "UNKNOWN"
    http_status: ClassVar[int] = 500

    def __init__(self, reason: str, message: str, /, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items() if value is not None}

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders inside Ray; the default reduction would lose reason and metadata.
        return _rebuild, (type(self), self.reason, self.message, self.metadata)


def _rebuild(kind: type[StagelineError], reason: str, message: str, metadata: dict[str, str]) -> StagelineError:
    error = kind(reason, message)
    error.metadata = metadata
    return error


class InvalidArgumentError(StagelineError):
    """The request is wrong whatever the state of the server."""

    code = "INVALID_ARGUMENT"
    http_status = 400


class ConfigError(InvalidArgumentError):
    """A flag, an environment variable or a configuration file is wrong."""


class CheckpointError(InvalidArgumentError):
    """A checkpoint is incomplete, damaged or of an unknown architecture."""


class UnauthenticatedError(StagelineError):
    """No valid credentials."""

    code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDeniedError(StagelineError):
    """Known, but not allowed to do that."""

    code = "PERMISSION_DENIED"
    http_status = 403


class NotFoundError(StagelineError):
    """No such model or object."""

    code = "NOT_FOUND"
    http_status = 404


class FailedPreconditionError(StagelineError):
    """The request is right but the state of the server is not: another fingerprint, a stale epoch."""

    code = "FAILED_PRECONDITION"
    http_status = 400


class ResourceExhaustedError(StagelineError):
    """A bounded queue or memory is full; the same request can succeed later."""

    code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, reason: str, message: str, /, *, retry_after_s: float = 1.0, **metadata: object) -> None:
        super().__init__(reason, message, retry_after_s=retry_after_s, **metadata)


class UnimplementedError(StagelineError):
    """A documented field or method that this version does not serve; it is refused by name."""

    code = "UNIMPLEMENTED"
    http_status = 400


class DeadlineExceededError(StagelineError):
    """The deadline passed before the request ended."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504


class UnavailableError(StagelineError):
    """No pipeline can serve now; retry with backoff."""

    code = "UNAVAILABLE"
    http_status = 503

    def __init__(self, reason: str, message: str, /, *, retry_after_s: float = 1.0, **metadata: object) -> None:
        super().__init__(reason, message, retry_after_s=retry_after_s, **metadata)


class InternalError(StagelineError):
    """Our own failure."""

    code = "INTERNAL"
    http_status = 500
