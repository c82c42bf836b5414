"""The asyncio client: the loops of `sync.Client` with awaits; every decision is in the pure modules both use."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from stageline.client.attempts import Attempts
from stageline.client.backoff import Backoff
from stageline.client.collect import Collector
from stageline.client.connection import OPTIONS, Endpoints, Tls
from stageline.client.progress import Progress
from stageline.grpc_errors import from_rpc_error
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub


class AsyncClient:
    """As `Client`, on one event loop."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        backoff: Backoff | None = None,
    ) -> None:
        """`addresses` are HOST:PORT, all of one model. Without `tls` the connection is plain text."""
        self._endpoints = Endpoints.make(addresses, tls, api_key, metadata)
        self._backoff = backoff or Backoff()
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; running calls end with an error."""
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close(None) for channel in channels.values()))

    async def stream_generate(
        self, generation: gen.Generation, *, timeout_s: float | None = None
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """See Client.stream_generate. Use `contextlib.aclosing` to cancel the request where you stop to listen."""
        progress = Progress(generation)
        attempts = Attempts(self._backoff, _deadline(timeout_s))
        usage: gen.Usage | None = None
        while not progress.finished:
            try:
                for request in progress.requests():
                    async with aclosing(self._open(request, attempts)) as messages:
                        async for message in messages:
                            attempts.progressed()
                            if message.HasField("start") and not progress.begin(message.start):
                                continue  # of a resumed stream: the caller has one already
                            usage = message.usage if message.HasField("usage") else usage
                            for delta in message.choices:
                                progress.take(delta)
                            if not message.HasField("usage"):
                                yield message
            except grpc.aio.AioRpcError as error:
                if not progress.finished:
                    await self._wait(error, attempts)
        yield pb.StreamGenerateResponse(usage=progress.usage(usage))

    async def generate(self, generation: gen.Generation, *, timeout_s: float | None = None) -> pb.GenerateResponse:
        """See Client.generate."""
        collector = Collector()
        async for message in self.stream_generate(generation, timeout_s=timeout_s):
            collector.take(message)
        return collector.answer()

    async def tokenize(self, request: pb.TokenizeRequest, *, timeout_s: float | None = None) -> pb.TokenizeResponse:
        """Token ids of text or of a conversation."""
        answer: pb.TokenizeResponse = await self._unary(lambda stub: stub.Tokenize, request, timeout_s)
        return answer

    async def detokenize(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None = None
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        answer: pb.DetokenizeResponse = await self._unary(lambda stub: stub.Detokenize, request, timeout_s)
        return answer

    async def get_model(self, *, timeout_s: float | None = None) -> pb.GetModelResponse:
        """The model and what serves it."""
        answer: pb.GetModelResponse = await self._unary(lambda stub: stub.GetModel, pb.GetModelRequest(), timeout_s)
        return answer

    async def _open(
        self, generation: gen.Generation, attempts: Attempts
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        call: Any = self._stub(attempts.number).StreamGenerate(
            pb.StreamGenerateRequest(generation=generation),
            timeout=attempts.left_s(time.monotonic()),
            metadata=self._endpoints.metadata,
        )
        messages: AsyncIterator[pb.StreamGenerateResponse] = call
        try:
            async for message in messages:
                yield message
        finally:
            call.cancel()  # where the caller has stopped to listen; nothing after the end

    async def _unary(self, method: Callable[[Any], Any], request: Any, timeout_s: float | None) -> Any:
        attempts = Attempts(self._backoff, _deadline(timeout_s))
        while True:
            try:
                call = method(self._stub(attempts.number))
                return await call(request, timeout=attempts.left_s(time.monotonic()), metadata=self._endpoints.metadata)
            except grpc.aio.AioRpcError as error:
                await self._wait(error, attempts)

    async def _wait(self, error: grpc.aio.AioRpcError, attempts: Attempts) -> None:
        await asyncio.sleep(attempts.wait_s(from_rpc_error(error), time.monotonic(), random.random()))

    def _stub(self, attempt: int) -> Any:
        address, tls = self._endpoints.address(attempt), self._endpoints.tls
        if address not in self._channels:
            self._channels[address] = (
                grpc.aio.insecure_channel(address, options=OPTIONS)
                if tls is None
                else grpc.aio.secure_channel(address, tls.credentials(), options=OPTIONS)
            )
        return InferenceServiceStub(self._channels[address])


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s
