"""One table between typed errors and gRPC statuses, in both directions."""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from stageline import errors
from stageline.errors import StagelineError

_BY_CODE: dict[str, type[StagelineError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidArgumentError,
        errors.UnauthenticatedError,
        errors.PermissionDeniedError,
        errors.NotFoundError,
        errors.FailedPreconditionError,
        errors.ResourceExhaustedError,
        errors.UnimplementedError,
        errors.DeadlineExceededError,
        errors.UnavailableError,
        errors.InternalError,
    )
}


def to_status(error: StagelineError, request_id: str = "") -> status_pb2.Status:
    """The status of an error: ErrorInfo always, RequestInfo where the request has a name, BadRequest where a field is at
    fault, RetryInfo where a retry can succeed."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN, metadata=error.metadata)]
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    field = error.metadata.get("field")
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_s = error.metadata.get("retry_after_s")
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(float(retry_after_s) * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message, details=packed)


def from_rpc_error(error: Any) -> StagelineError:
    """The typed error behind a failed call; a status without our ErrorInfo gets the reason of its code.

    RetryInfo becomes `retry_after_s` of the metadata, RequestInfo `request_id`, where ErrorInfo does not say them.
    """
    code = error.code()
    kind = _BY_CODE.get(code.name, errors.InternalError)
    reason, message = code.name, f"gRPC {code.name}: {error.details()}"
    metadata: dict[str, str] = {}
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        request = error_details_pb2.RequestInfo()
        if detail.Unpack(info) and info.domain == errors.DOMAIN:
            reason, message = info.reason, error.details() or ""
            metadata.update(info.metadata)
        elif detail.Unpack(retry):  # a proxy may send one without our ErrorInfo
            metadata.setdefault("retry_after_s", str(retry.retry_delay.ToTimedelta().total_seconds()))
        elif detail.Unpack(request):
            metadata.setdefault("request_id", request.request_id)
    typed = kind(reason, message)
    typed.metadata = metadata
    return typed
