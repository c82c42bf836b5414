"""The FastAPI application. Serve's ingress runs it; any ASGI server can."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from gateway.api.http.answers import ChatForm, CompletionForm, envelope, usage
from gateway.api.http.schema import ChatBody, CompletionBody
from gateway.api.service import Frontend
from gateway.types import ChoiceDelta, GenerateRequest
from stageline.errors import InternalError, InvalidArgumentError, StagelineError

B = TypeVar("B", bound=BaseModel)

logger = logging.getLogger("stageline.gateway")

MAX_BODY_BYTES = 16 << 20
DEADLINE_HEADER = "x-request-timeout-s"


def create_http_app(frontend: Callable[[], Frontend]) -> FastAPI:
    """`frontend()` is called for each request, so the application can be made before the engine is."""
    app = FastAPI(title="Stageline", docs_url=None, redoc_url=None)

    @app.exception_handler(StagelineError)
    async def on_error(request: Request, error: StagelineError) -> JSONResponse:
        headers = {"Retry-After": error.metadata["retry_after_s"]} if "retry_after_s" in error.metadata else {}
        return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        ready = frontend().engine.ready()
        return JSONResponse({"status": "ready" if ready else "no pipeline is ready"}, status_code=200 if ready else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = frontend().model
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "stageline",
                 "max_model_len": model.max_context_tokens}  # fmt: skip
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body, front = await _body(request, CompletionBody), frontend()
        front.check_model(body.model)
        body.check()
        raw = body.raw(body.max_tokens, body.logprobs)
        prompts = body.prompts()
        if not prompts:
            raise InvalidArgumentError("PROMPT_EMPTY", "prompt must not be empty", field="prompt")
        requests = [
            front.request(prompt, raw, num_choices=_or(body.n, 1), deadline_s=_deadline(request), default_max_tokens=16)
            for prompt in prompts
        ]
        return await _answer(front, requests, CompletionForm(front.tokenizer), body)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body, front = await _body(request, ChatBody), frontend()
        front.check_model(body.model)
        body.check()
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        text = front.render([message.plain() for message in body.messages])
        parsed = front.request(
            text, body.raw(max_tokens, body.num_logprobs()), num_choices=_or(body.n, 1), deadline_s=_deadline(request)
        )
        return await _answer(front, [parsed], ChatForm(front.tokenizer), body)

    return app


def error_body(error: StagelineError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if error.http_status in (400, 404) else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": "rate_limit_error" if error.http_status == 429 else kind,
            "param": error.metadata.get("field"),
            "code": error.reason,
        }
    }


async def _body(request: Request, kind: type[B]) -> B:
    """The checked body. Raises InvalidArgumentError for anything but a JSON object with known fields."""
    data = await request.body()
    if len(data) > MAX_BODY_BYTES:
        raise InvalidArgumentError(
            "BODY_TOO_LARGE", f"the body has {len(data)} bytes, at most {MAX_BODY_BYTES} are read"
        )
    try:
        parsed = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            "BODY_NOT_UTF8", f"the body is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("BODY_NOT_JSON", f"the body is not JSON: {error}") from None
    try:
        return kind.model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InvalidArgumentError("PARAMETER_UNKNOWN", f"unknown parameter {name!r}", field=name) from None
        raise InvalidArgumentError("PARAMETER_INVALID", f"{name or 'body'}: {first['msg']}", field=name) from None


def _deadline(request: Request) -> float | None:
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise InvalidArgumentError(
            "DEADLINE_INVALID", f"{DEADLINE_HEADER} must be seconds over 0, got {text!r}", field=DEADLINE_HEADER
        )
    return time.monotonic() + seconds


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


async def _merged(front: Frontend, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, ChoiceDelta], None]:
    """Deltas of all requests as they come, with the choice's number over all of them; closing it cancels all."""
    deltas: asyncio.Queue[tuple[int, ChoiceDelta] | StagelineError | None] = asyncio.Queue()

    async def run(first: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(front.engine.generate(request)) as stream:
                async for delta in stream:
                    deltas.put_nowait((first + delta.index, delta))
            deltas.put_nowait(None)
        except StagelineError as error:
            deltas.put_nowait(error)
        except Exception as error:  # a bug of ours: the client hears it as one
            logger.exception("request %s failed", request.request_id)
            deltas.put_nowait(InternalError("BUG", f"request {request.request_id} failed: {type(error).__name__}"))

    tasks = [asyncio.create_task(run(i * request.num_choices, request)) for i, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            item = await deltas.get()
            if isinstance(item, StagelineError):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(
    front: Frontend, requests: list[GenerateRequest], form: ChatForm | CompletionForm, body: ChatBody | CompletionBody
) -> Response:
    request_id, model = requests[0].request_id, front.model
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(front, requests, form, with_usage, prompt_tokens), media_type="text/event-stream"
        )
    collected: dict[int, list[ChoiceDelta]] = {}
    async with aclosing(_merged(front, requests)) as merged:
        async for index, delta in merged:
            collected.setdefault(index, []).append(delta)
    choices = [form.whole(collected[index], index) for index in sorted(collected)]
    completion = sum(len(delta.token_ids) for deltas in collected.values() for delta in deltas)
    answer = envelope(form.kind, request_id, model.name, model.fingerprint, choices)
    return JSONResponse({**answer, "usage": usage(prompt_tokens, completion)})


async def _events(
    front: Frontend,
    requests: list[GenerateRequest],
    form: ChatForm | CompletionForm,
    with_usage: bool,
    prompt_tokens: int,
) -> AsyncIterator[str]:
    """Server-sent events; an error in the middle is an event too, since the status has gone out already."""
    model, completion = front.model, 0

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        data = envelope(form.chunk_kind, requests[0].request_id, model.name, model.fingerprint, choices)
        return f"data: {json.dumps({**data, **more}, ensure_ascii=False)}\n\n"

    try:
        async with aclosing(_merged(front, requests)) as merged:
            async for index, delta in merged:
                completion += len(delta.token_ids)
                yield event([form.chunk(delta, index)], **({"usage": None} if with_usage else {}))
    except StagelineError as error:
        yield f"data: {json.dumps(error_body(error), ensure_ascii=False)}\n\n"
        return
    if with_usage:
        yield event([], usage=usage(prompt_tokens, completion))
    yield "data: [DONE]\n\n"
