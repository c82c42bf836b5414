"""The OpenAPI document, made true: our statuses and errors, headers, keys, streams, and the one model's name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from gateway.api.http.documents import ChatChunk, CompletionChunk, ErrorResponse, Status
from gateway.api.http.door import OPEN_TO_ALL
from gateway.api.request_id import HEADER

try:
    VERSION = version("stageline")
except PackageNotFoundError:  # run from a checkout
    VERSION = "0"

DEADLINE_HEADER = "x-request-timeout-s"

STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known or has expired.",
    403: "This tenant may not do that.",
    404: "Not here: `param` names what.",
    413: "The body is too large.",
    429: "A limit is reached or the queue is full; come back after `retry-after` seconds.",
    500: "Our own failure; the server's log has the cause under the request's id.",
    503: "No pipeline can serve now.",
    504: "The deadline passed.",
}
_EVERYWHERE = (400, 401, 429, 500)  # 400: a request id that fits no log line
_GENERATION = (403, 404, 413, 503, 504)
_CHUNKS = (CompletionChunk, ChatChunk)
_HEADER = {HEADER: {"schema": {"type": "string"}, "description": "Name of the request, for logs and errors."}}
_NAME = {
    "name": HEADER, "in": "header", "required": False, "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    "description": "A name for the request, for logs and errors; one is drawn where there is none.",
}  # fmt: skip
_DEADLINE = {
    "name": DEADLINE_HEADER, "in": "header", "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9},
    "description": "Seconds that the answer may take; then 504, or the end of the stream.",
}  # fmt: skip
_KEY = {"type": "http", "scheme": "bearer", "description": "An API key, where the server has keys."}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These statuses, and those of every path behind the door, with OpenAI's error object."""
    every = sorted({*statuses, *_EVERYWHERE})
    return {status: {"model": ErrorResponse, "description": STATUSES[status]} for status in every}


def probe_errors() -> dict[int | str, dict[str, Any]]:
    """Those of paths that need no key."""
    return {status: {"model": ErrorResponse, "description": STATUSES[status]} for status in (400, 500)}


def not_ready() -> dict[int | str, dict[str, Any]]:
    """/readyz also answers 503."""
    return {**probe_errors(), 503: {"model": Status, "description": STATUSES[503]}}


def generation(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """What a path that generates answers: one object, or with `stream` server-sent events that hold chunks."""
    stream = {
        "schema": {"type": "string", "description": f"`data: {chunk.__name__}` events, then `data: [DONE]`."},
        "x-event-schema": {"$ref": f"#/components/schemas/{chunk.__name__}"},
    }
    return {
        "response_model": None,
        "responses": {
            200: {"model": whole, "description": "The answer.", "content": {"text/event-stream": stream}},
            **errors(*_GENERATION),
        },
        "openapi_extra": {"parameters": [_DEADLINE]},
    }


def linked(*operations: str, **parameters: str) -> dict[int | str, dict[str, Any]]:
    """The response 200 with links to `operations`, each given `parameters`: what of the answer names the object there."""
    links = {name: {"operationId": name, "parameters": parameters} for name in operations}
    return {200: {"description": "Successful Response", "links": links}}


def operation_id(route: APIRoute) -> str:
    """The name of the function."""
    return route.name


def install(app: FastAPI, model_name: Callable[[], str]) -> None:
    """Serve the document as it is; `model_name` is called when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, model_name())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, model_name: str) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document["components"]
    schemas = components["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for chunk in _CHUNKS:
        own = chunk.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(own.pop("$defs", {}))
        schemas[chunk.__name__] = own
    for name in ("CompletionBody", "ChatBody", "TokenizeText", "TokenizeChat", "Detokenize"):
        schemas[name]["properties"]["model"] = {"enum": [model_name, None], "title": "Model"}
    components["securitySchemes"] = {"key": _KEY}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation.setdefault("parameters", []).append(_NAME)
            operation["security"] = [] if path in OPEN_TO_ALL else [{}, {"key": []}]
            operation["responses"].pop("422", None)  # FastAPI's; ours is 400
            for status, response in operation["responses"].items():
                response["headers"] = _HEADER
                if int(status) >= 400:  # FastAPI says the media type of the path's 200
                    response["content"] = {"application/json": next(iter(response["content"].values()))}
    return document
