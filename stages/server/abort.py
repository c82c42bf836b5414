"""Typed errors as gRPC statuses."""

from __future__ import annotations

from typing import Any, NoReturn

from grpc_status import rpc_status

from stageline.errors import StagelineError
from stageline.grpc_errors import to_status


async def abort(context: Any, error: StagelineError) -> NoReturn:
    """End the call with the error's code and its ErrorInfo."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort does not return")
