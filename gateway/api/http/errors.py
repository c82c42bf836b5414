"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}; `code` is our reason in lower case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from gateway.api.errors import as_typed
from stageline.errors import InvalidArgumentError, StagelineError

_HTTP_REASONS = {
    400: ("JSON_INVALID", "the body is not JSON in UTF-8, or nested too deep"),  # FastAPI's answer to such bytes
    404: ("NOT_FOUND", "no such path: {method} {path}"),
    405: ("METHOD_NOT_ALLOWED", "{path} does not take {method}"),
    413: ("BODY_TOO_LARGE", "{detail}"),
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_object(error: StagelineError) -> dict[str, Any]:
    """The object that OpenAI clients parse, in a response or in a stream."""
    kind = _TYPES.get(error.http_status, "invalid_request_error" if error.http_status < 500 else "server_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.metadata.get("field"),
            "code": error.reason.lower(),
        }
    }


def error_headers(error: StagelineError) -> dict[str, str]:
    """Retry-After in whole seconds, at least 1, where a retry can succeed; what is asked for where a key is missing."""
    if error.http_status == 401:
        return {"www-authenticate": "Bearer"}
    retry_after_s = error.metadata.get("retry_after_s")
    return {} if retry_after_s is None else {"retry-after": str(max(1, math.ceil(float(retry_after_s))))}


def error_response(error: StagelineError) -> JSONResponse:
    """Status, headers and object of an error."""
    return JSONResponse(error_object(error), status_code=error.http_status, headers=error_headers(error))


def from_validation(details: Mapping[str, Any]) -> InvalidArgumentError:
    """What pydantic found, as our error: unknown parameters and wrong types by name, JSON by position."""
    kind, message = details["type"], details["msg"]
    place = [str(part) for part in details["loc"] if part != "body"]
    if kind == "json_invalid":
        why = details.get("ctx", {}).get("error", message)
        return InvalidArgumentError(
            "JSON_INVALID", f"the body is not valid JSON: {why} at character {place[-1] if place else 0}"
        )
    field = ".".join(place) or None
    if kind == "extra_forbidden":
        return InvalidArgumentError("UNKNOWN_PARAMETER", f"unknown parameter {field!r}; leave it out", field=field)
    if field is None:
        return InvalidArgumentError("BODY_INVALID", f"the body must be a JSON object: {message}")
    if kind == "missing":
        return InvalidArgumentError("PARAMETER_MISSING", f"{field} is required", field=field)
    return InvalidArgumentError("PARAMETER_INVALID", f"{field}: {message}", field=field)


def _methods(request: Request) -> list[str]:
    """What the request's path takes."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") if takes(method)]


def install(app: FastAPI) -> None:
    """Every error of the application leaves it in this form."""

    async def typed(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_typed(error, where=f"{request.method} {request.url.path}"))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error.errors()[0]))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        reason, message = _HTTP_REASONS.get(error.status_code, ("HTTP_ERROR", "{detail}"))
        message = message.format(method=request.method, path=request.url.path, detail=error.detail)
        body = error_object(InvalidArgumentError(reason, message))
        headers = error.headers
        if error.status_code == 405:  # starlette names the methods of the first route that matches
            headers = {"allow": ", ".join(_methods(request))}
        return JSONResponse(body, status_code=error.status_code, headers=headers)

    app.add_exception_handler(StagelineError, typed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, typed)
