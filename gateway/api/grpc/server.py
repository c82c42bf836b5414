"""InferenceService on its own port, with health and reflection. Deadlines and cancellation reach the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from gateway.api.grpc.convert import to_delta, to_model, to_prompt, to_request, to_start
from gateway.api.service import Frontend
from gateway.types import ChoiceDelta, GenerateRequest
from stageline.errors import ConfigError, InternalError, InvalidArgumentError, StagelineError
from stageline.grpc_errors import to_status
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_MESSAGE_BYTES = 16 << 20
HEALTH_PERIOD_S = 0.1
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


class GrpcDoor(pb_grpc.InferenceServiceServicer):
    """The service and the server it runs on."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._server = grpc.aio.server(options=OPTIONS)
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises ConfigError where it is taken."""
        pb_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise ConfigError(
                "PORT_IN_USE", f"gRPC cannot listen on {host}:{port}; stop what listens there or choose another port",
                field="server.grpc_port", port=port,
            ) from None  # fmt: skip
        await self._set_health()
        await self._server.start()
        self._task = asyncio.create_task(self._keep_health())
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds."""
        if self._task is not None:
            self._task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """See InferenceService."""
        try:
            parsed = self._parse(request.generation, context)
            choices: dict[int, gen.ChoiceDelta] = {}
            tokens = 0
            async with aclosing(self._deltas(parsed)) as deltas:
                async for delta in deltas:
                    tokens += len(delta.token_ids)
                    whole = choices.setdefault(delta.index, gen.ChoiceDelta(index=delta.index))
                    _append(whole, to_delta(self._frontend, delta))
            return pb.GenerateResponse(
                start=to_start(self._frontend, parsed),
                choices=[choices[index] for index in sorted(choices)],
                usage=_usage(parsed, tokens),
            )
        except StagelineError as error:
            await abort(context, error)
        raise AssertionError("abort does not return")

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        """See InferenceService."""
        try:
            parsed = self._parse(request.generation, context)
            yield pb.StreamGenerateResponse(start=to_start(self._frontend, parsed))
            tokens = 0
            async with aclosing(self._deltas(parsed)) as deltas:
                async for delta in deltas:
                    tokens += len(delta.token_ids)
                    yield pb.StreamGenerateResponse(choices=[to_delta(self._frontend, delta)])
            yield pb.StreamGenerateResponse(usage=_usage(parsed, tokens))
        except StagelineError as error:
            await abort(context, error)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """See InferenceService."""
        try:
            text = to_prompt(self._frontend, request)
            assert isinstance(text, str)
            return pb.TokenizeResponse(token_ids=self._frontend.tokenizer.encode(text), text=text)
        except StagelineError as error:
            await abort(context, error)
        raise AssertionError("abort does not return")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """See InferenceService."""
        try:
            for index, token_id in enumerate(request.token_ids):
                if token_id >= self._frontend.model.vocab_size:
                    raise InvalidArgumentError(
                        "TOKEN_ID_OUT_OF_RANGE",
                        f"token_ids[{index}] is {token_id}, expected less than {self._frontend.model.vocab_size}",
                        field="token_ids", index=index, token_id=token_id,
                    )  # fmt: skip
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            return pb.DetokenizeResponse(
                text=self._frontend.tokenizer.decode(request.token_ids, skip_special_tokens=skip)
            )
        except StagelineError as error:
            await abort(context, error)
        raise AssertionError("abort does not return")

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """See InferenceService."""
        return to_model(self._frontend)

    def _parse(self, message: gen.Generation, context: Any) -> GenerateRequest:
        remaining = context.time_remaining()
        deadline_s = None if remaining is None else time.monotonic() + remaining
        return to_request(self._frontend, message, deadline_s)

    async def _deltas(self, request: GenerateRequest) -> AsyncGenerator[ChoiceDelta, None]:
        """The engine's deltas; what is not a typed error is a bug of ours and must not reach the client as a traceback."""
        try:
            async with aclosing(self._frontend.engine.generate(request)) as deltas:
                async for delta in deltas:
                    yield delta
        except (StagelineError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            raise InternalError("BUG", f"request {request.request_id} failed: {type(error).__name__}") from error

    async def _keep_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            await self._set_health()

    async def _set_health(self) -> None:
        ready = self._frontend.engine.ready()
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)


async def serve_grpc(frontend: Frontend, host: str, port: int) -> GrpcDoor:
    """Open the door. Raises ConfigError where the port is taken."""
    door = GrpcDoor(frontend)
    await door.start(host, port)
    return door


async def abort(context: Any, error: StagelineError) -> None:
    """End the call with the error's status; works in the middle of a stream too."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _append(whole: gen.ChoiceDelta, delta: gen.ChoiceDelta) -> None:
    whole.text += delta.text
    whole.token_ids.extend(delta.token_ids)
    whole.logprobs.extend(delta.logprobs)
    whole.finish_reason, whole.matched_stop = delta.finish_reason, delta.matched_stop


def _usage(request: GenerateRequest, tokens: int) -> gen.Usage:
    completion = tokens + len(request.resume_token_ids)
    return gen.Usage(prompt_tokens=len(request.prompt_token_ids), completion_tokens=completion)
