"""The OpenAPI document: what each path answers. The models describe; the writers build the objects themselves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from gateway.api.request_id import HEADER

try:
    VERSION = version("stageline")
except PackageNotFoundError:  # run from a checkout
    VERSION = "0"

FinishReason = Literal["stop", "length", "tool_calls"]

STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known or has expired.",
    403: "This tenant may not do that.",
    404: "No such model.",
    413: "The body is too large.",
    429: "The queue is full; come back after `retry-after` seconds.",
    500: "Our own failure; the server's log has the cause under the request's id.",
    503: "No pipeline can serve now.",
    504: "The deadline passed.",
}


class Status(BaseModel):
    """A word about the server."""

    status: str


class Model(BaseModel):
    """The model served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["stageline"] = "stageline"
    max_model_len: int


class ModelList(BaseModel):
    """The models served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorObject(BaseModel):
    """`code` is stable, for programs; `message` is for people."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorObject


class PromptTokensDetails(BaseModel):
    """Tokens of the prompts that came from the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """One token and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    """The chosen token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """One entry for each token, in four lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(BaseModel):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class PromptLogprob(BaseModel):
    """One token that could stand in the prompt; `rank` is 1 for the most probable."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(BaseModel):
    """One continuation. `prompt_logprobs` where asked: for each token of the prompt, by token id; null for the first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class _Envelope(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int


class Completion(_Envelope):
    """Whole continuations."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletion(_Envelope):
    """Whole answers. `prompt_logprobs` where asked, as in CompletionChoice."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionChunkChoice(CompletionChoice):
    """What is new of one continuation."""

    finish_reason: FinishReason | None  # type: ignore[assignment]


class CompletionChunk(_Envelope):
    """Data of one event."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class FunctionDelta(BaseModel):
    """The name comes first, then the arguments in pieces."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new of one call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new of one answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(_Envelope):
    """Data of one event."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These statuses, and those of every path that needs a key, with OpenAI's error object."""
    every = sorted({*statuses, 401, 429})
    return {status: {"model": ErrorResponse, "description": STATUSES[status]} for status in every}


def not_ready() -> dict[int | str, dict[str, Any]]:
    """503 of /readyz."""
    return {503: {"model": Status, "description": "No pipeline can serve now."}}


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
            **errors(400, 403, 404, 413, 500, 503, 504),
        },
    }


_CHUNKS = (CompletionChunk, ChatChunk)


def install(app: FastAPI) -> None:
    """Serve the document as it is: our errors instead of FastAPI's 422, and the header of every response."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for chunk in _CHUNKS:
        own = chunk.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(own.pop("$defs", {}))
        schemas[chunk.__name__] = own
    header = {HEADER: {"schema": {"type": "string"}, "description": "Name of the request, for logs and errors."}}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for response in operation["responses"].values():
                response["headers"] = header
    return document
