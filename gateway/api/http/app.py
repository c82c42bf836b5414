"""The OpenAI-compatible application. Built by a function inside the replica that serves it (a FastAPI application cannot
be pickled), and without a lifespan, as Serve's ingress needs it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from gateway.api import request_id
from gateway.api.collect import Answer
from gateway.api.http import batches, documents, openapi, tokenizer_api
from gateway.api.http.answers import AnswerWriter, ChatWriter, CompletionWriter
from gateway.api.http.bodies import CompletionBody
from gateway.api.http.body_limit import BodyLimit
from gateway.api.http.chat_body import ChatBody
from gateway.api.http.door import Door
from gateway.api.http.errors import install
from gateway.api.http.failures import Failures
from gateway.api.http.merge import merged
from gateway.api.http.openapi import DEADLINE_HEADER
from gateway.api.http.request_ids import RequestIds
from gateway.api.http.responses import AnswerResponse
from gateway.api.http.tracing import Traced
from gateway.api.service import Accepted, Frontend
from gateway.batch.service import BatchService
from gateway.metrics import CONTENT_TYPE as METRICS_TYPE
from stageline.errors import InvalidArgumentError, NotFoundError

MAX_BODY_BYTES = 16 * 2**20


def create_http_app(
    frontend_getter: Callable[[], Frontend],
    *,
    batches_getter: Callable[[], BatchService | None] = lambda: None,
    write_timeout_s: float = 600.0,
) -> FastAPI:
    """The application; the getters are called for each request, so what they give may come later than the application.

    A response ends when a piece of it has waited `write_timeout_s` for its reader.
    """
    app = FastAPI(
        title="Stageline",
        version=openapi.VERSION,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
    )
    uploads = {batches.UPLOAD_PATH: batches.MAX_UPLOAD_BYTES}
    app.add_middleware(Failures)  # added first, so innermost
    app.add_middleware(BodyLimit, max_body_bytes=MAX_BODY_BYTES, larger=uploads)
    app.add_middleware(Traced, tracing_getter=lambda: frontend_getter().tracing)
    app.add_middleware(Door, doorkeeper_getter=lambda: frontend_getter().doorkeeper)
    app.add_middleware(RequestIds)  # added last, so outermost: errors of the others have the id too
    install(app)
    app.include_router(_generation(frontend_getter, write_timeout_s))
    app.include_router(tokenizer_api.router(frontend_getter))
    app.include_router(batches.router(batches_getter))
    openapi.install(app, lambda: frontend_getter().model.name)

    @app.get("/healthz", responses=openapi.probe_errors())
    async def healthz() -> documents.Status:
        """The process is alive."""
        return documents.Status(status="alive")

    @app.get("/readyz", responses=openapi.not_ready())
    async def readyz(response: Response) -> documents.Status:
        """A pipeline can serve: 200, else 503."""
        ready = frontend_getter().engine.ready()
        response.status_code = 200 if ready else 503
        return documents.Status(status="ready" if ready else "not ready")

    @app.get("/metrics", response_class=PlainTextResponse, responses=openapi.errors())
    async def metrics() -> Response:
        """Numbers in Prometheus' text format."""
        return Response(frontend_getter().engine.metrics.render(), media_type=METRICS_TYPE)

    return app


def _generation(frontend_getter: Callable[[], Frontend], write_timeout_s: float) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses=openapi.errors())
    async def models() -> documents.ModelList:
        """The one model."""
        return documents.ModelList(data=[_model(frontend_getter())])

    @router.get("/v1/models/{model:path}", responses=openapi.errors(404))
    async def retrieve_model(model: str) -> documents.Model:
        """The one model, by name."""
        frontend = frontend_getter()
        if model != frontend.model.name:
            raise NotFoundError(
                "MODEL_NOT_FOUND", f"model {model[:128]!r} is not served here; this server has {frontend.model.name!r}",
                field="model", model=model[:128], served=frontend.model.name,
            )  # fmt: skip
        return _model(frontend)

    @router.post("/v1/completions", **openapi.generation(documents.Completion, documents.CompletionChunk))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        writer = partial(
            CompletionWriter,
            echo=bool(body.echo),
            num_logprobs=body.logprobs,
            num_prompt_logprobs=body.prompt_logprobs,
        )
        return await _answer(frontend_getter(), body, request, writer, "cmpl", write_timeout_s)

    @router.post("/v1/chat/completions", **openapi.generation(documents.ChatCompletion, documents.ChatChunk))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        writer = partial(ChatWriter, num_prompt_logprobs=body.prompt_logprobs)
        return await _answer(frontend_getter(), body, request, writer, "chatcmpl", write_timeout_s)

    return router


def _model(frontend: Frontend) -> documents.Model:
    return documents.Model(
        id=frontend.model.name, created=frontend.started_s, max_model_len=frontend.model.max_context_tokens
    )


async def _answer(
    frontend: Frontend,
    body: CompletionBody | ChatBody,
    request: Request,
    make_writer: Callable[..., AnswerWriter],
    prefix: str,
    write_timeout_s: float,
) -> Response:
    body.check()
    response_id = f"{prefix}-{request_id.current.get()}"
    raws = body.raw_requests(request_id.current.get(), _deadline_s(request))
    accepted = [await frontend.accept(raw) for raw in raws]
    writer = make_writer(response_id, accepted, frontend.model, frontend.tokenizer)
    if body.stream:
        objects = _chunks(frontend, accepted, writer, *body.usage_chunks())
    else:
        objects = _whole(frontend, accepted, writer)
    return AnswerResponse(
        objects,
        streamed=bool(body.stream),
        where=f"{request.method} {request.url.path}",
        write_timeout_s=write_timeout_s,
    )


async def _chunks(
    frontend: Frontend, accepted: list[Accepted], writer: AnswerWriter, with_usage: bool, continuous: bool
) -> AsyncGenerator[dict[str, Any]]:
    num_choices = accepted[0].request.num_choices
    async with aclosing(merged([frontend.stream(one) for one in accepted])) as deltas:
        async for place, delta in deltas:
            index = place * num_choices + delta.index
            chunk = writer.chunk(delta, index, with_usage=with_usage, continuous=continuous)
            if chunk is not None:
                yield chunk
    if with_usage:
        yield writer.usage_chunk()


async def _whole(frontend: Frontend, accepted: list[Accepted], writer: AnswerWriter) -> AsyncGenerator[dict[str, Any]]:
    async def one(single: Accepted) -> AsyncGenerator[Answer]:
        yield await frontend.collect(single)

    answers: dict[int, Answer] = {}
    async with aclosing(merged([one(single) for single in accepted])) as collected:
        async for place, answer in collected:
            answers[place] = answer
    yield writer.whole([answers[place] for place in range(len(accepted))])


def _deadline_s(request: Request) -> float | None:
    """The header's seconds from now, on the time.monotonic clock. Raises InvalidArgumentError for anything else."""
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text) if "_" not in text else 0.0  # Python's 1_000 is no number elsewhere
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InvalidArgumentError(
            "DEADLINE_INVALID", f"{DEADLINE_HEADER} must be seconds over 0, got {text[:32]!r}",
            field=DEADLINE_HEADER, value=text[:32],
        )  # fmt: skip
    return time.monotonic() + seconds
