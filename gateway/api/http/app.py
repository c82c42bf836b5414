"""The OpenAI-compatible application. Built by a function inside the replica that serves it (a FastAPI application cannot
be pickled), and without a lifespan, as Serve's ingress needs it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gateway.api.http.answers import AnswerWriter, ChatWriter, CompletionWriter
from gateway.api.http.bodies import ChatBody, CompletionBody
from gateway.api.http.body_limit import BodyLimit
from gateway.api.http.errors import install
from gateway.api.http.merge import merged
from gateway.api.http.responses import AnswerResponse
from gateway.api.service import Accepted, Frontend
from gateway.types import ChoiceDelta
from stageline.errors import InvalidArgumentError

MAX_BODY_BYTES = 16 * 2**20
DEADLINE_HEADER = "x-request-timeout-s"


def create_http_app(frontend_getter: Callable[[], Frontend]) -> FastAPI:
    """The application; `frontend_getter` is called for each request, so the Frontend may come later than the application."""
    app = FastAPI(title="Stageline", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_body_bytes=MAX_BODY_BYTES)
    install(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """A pipeline can serve: 200, else 503."""
        ready = frontend_getter().engine.ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, status_code=200 if ready else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        frontend = frontend_getter()
        model = {
            "id": frontend.model.name,
            "object": "model",
            "created": frontend.started_s,
            "owned_by": "stageline",
            "max_model_len": frontend.model.max_context_tokens,
        }
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        return await _answer(frontend_getter(), body, request, CompletionWriter, "cmpl")

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(frontend_getter(), body, request, ChatWriter, "chatcmpl")

    return app


async def _answer(
    frontend: Frontend, body: CompletionBody | ChatBody, request: Request, writer_class: type[AnswerWriter], prefix: str
) -> Response:
    body.check()
    response_id = f"{prefix}-{uuid.uuid4().hex}"
    raws = body.raw_requests(response_id, _deadline_s(request))
    accepted = [await frontend.accept(raw) for raw in raws]
    writer = writer_class(response_id, accepted, frontend.model, frontend.tokenizer)
    if body.stream:
        objects = _chunks(frontend, accepted, writer, with_usage=body.include_usage())
    else:
        objects = _whole(frontend, accepted, writer)
    return AnswerResponse(objects, streamed=bool(body.stream), where=f"{request.method} {request.url.path}")


async def _chunks(
    frontend: Frontend, accepted: list[Accepted], writer: AnswerWriter, *, with_usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    num_choices = accepted[0].request.num_choices
    async with aclosing(merged([frontend.stream(one) for one in accepted])) as deltas:
        async for place, delta in deltas:
            chunk = writer.chunk(delta, place * num_choices + delta.index, with_usage=with_usage)
            if chunk is not None:
                yield chunk
    if with_usage:
        yield writer.usage_chunk()


async def _whole(frontend: Frontend, accepted: list[Accepted], writer: AnswerWriter) -> AsyncGenerator[dict[str, Any]]:
    async def one(single: Accepted) -> AsyncGenerator[list[ChoiceDelta]]:
        yield await frontend.collect(single)

    answers: list[list[ChoiceDelta]] = [[] for _ in accepted]
    async with aclosing(merged([one(single) for single in accepted])) as collected:
        async for place, choices in collected:
            answers[place] = choices
    yield writer.whole([choice for choices in answers for choice in choices])


def _deadline_s(request: Request) -> float | None:
    """The header's seconds from now, on the time.monotonic clock. Raises InvalidArgumentError for anything else."""
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InvalidArgumentError(
            "DEADLINE_INVALID", f"{DEADLINE_HEADER} must be seconds over 0, got {text[:32]!r}",
            field=DEADLINE_HEADER, value=text[:32],
        )  # fmt: skip
    return time.monotonic() + seconds
