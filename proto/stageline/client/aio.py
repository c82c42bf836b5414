"""The asyncio client: the loops of `sync.Client` with awaits; every decision is in the pure modules both use."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc
import grpc.aio

from stageline.client.attempts import Attempts, cancelled_by_peer, closed, ended_early, failure
from stageline.client.backoff import Backoff
from stageline.client.collect import Collector
from stageline.client.connection import ChannelOptions, Endpoints, Tls, name_of_request
from stageline.client.progress import Progress, is_ranked
from stageline.errors import StagelineError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import scoring_pb2 as scoring
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
        channel: ChannelOptions | None = None,
    ) -> None:
        """`addresses` are HOST:PORT, all of one model. Without `tls` the connection is plain text."""
        self._endpoints = Endpoints(addresses, tls=tls, api_key=api_key, metadata=metadata, channel=channel)
        self._backoff = backoff or Backoff()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closed = asyncio.Event()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; running calls end with FailedPreconditionError (CLIENT_CLOSED)."""
        self._closed.set()
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close(None) for channel in channels.values()))

    async def stream_generate(
        self, generation: gen.Generation, *, timeout_s: float | None = None
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """See Client.stream_generate. Use `contextlib.aclosing` to cancel the request where you stop to listen."""
        progress = Progress(generation)
        attempts = self._attempts(timeout_s, generation.request_id)
        while not progress.finished:
            address = self._endpoints.address()
            try:
                async with aclosing(self._open(progress.requests(), address, attempts)) as messages:
                    async for message in messages:
                        if (fresh := progress.receive(message)) is not None:
                            attempts.received(fresh)
                            yield fresh
                error = ended_early(progress)
            except grpc.aio.AioRpcError as broken:
                error = failure(broken)
            except asyncio.CancelledError:
                if _is_ours():
                    raise
                error = cancelled_by_peer("reset")
            if not progress.finished:  # else only `usage` is lost
                await self._pause(error, address, attempts)
        yield progress.last()

    async def generate(self, generation: gen.Generation, *, timeout_s: float | None = None) -> pb.GenerateResponse:
        """See Client.generate."""
        if is_ranked(generation):
            whole = pb.GenerateRequest(generation=generation)
            ranked: pb.GenerateResponse = await self._unary(
                lambda stub: stub.Generate, whole, timeout_s, generation.request_id
            )
            return ranked
        collector = Collector()
        async with aclosing(self.stream_generate(generation, timeout_s=timeout_s)) as messages:
            async for message in messages:
                collector.take(message)
        return collector.answer()

    async def score(self, request: scoring.ScoreRequest, *, timeout_s: float | None = None) -> scoring.ScoreResponse:
        """Log-probabilities of continuations of one context; begun again where the gateway dies."""
        answer: scoring.ScoreResponse = await self._unary(
            lambda stub: stub.Score, request, timeout_s, request.request_id
        )
        return answer

    async def tokenize(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None = None, request_id: str = ""
    ) -> pb.TokenizeResponse:
        """Token ids of text or of a conversation."""
        answer: pb.TokenizeResponse = await self._unary(lambda stub: stub.Tokenize, request, timeout_s, request_id)
        return answer

    async def detokenize(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None = None, request_id: str = ""
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        answer: pb.DetokenizeResponse = await self._unary(lambda stub: stub.Detokenize, request, timeout_s, request_id)
        return answer

    async def get_model(self, *, timeout_s: float | None = None, request_id: str = "") -> pb.GetModelResponse:
        """The model and what serves it."""
        asked = pb.GetModelRequest()
        answer: pb.GetModelResponse = await self._unary(lambda stub: stub.GetModel, asked, timeout_s, request_id)
        return answer

    def _attempts(self, timeout_s: float | None, request_id: str) -> Attempts:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        return Attempts(self._backoff, deadline_s, name_of_request(request_id))

    async def _open(
        self, generations: Sequence[gen.Generation], address: str, attempts: Attempts
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """The messages of several streams as they come; all are cancelled when it is closed or one fails."""
        calls: list[Any] = []
        try:
            for generation in generations:
                request = pb.StreamGenerateRequest(generation=generation)
                calls.append(self._start(lambda stub: stub.StreamGenerate, request, address, attempts))
            if len(calls) == 1:
                async for message in calls[0]:
                    yield message
                return
            async with aclosing(_merged(calls)) as messages:
                async for message in messages:
                    yield message
        finally:
            for call in calls:
                call.cancel()  # nothing after the end

    async def _unary(self, method: Callable[[Any], Any], request: Any, timeout_s: float | None, request_id: str) -> Any:
        attempts = self._attempts(timeout_s, request_id)
        while True:
            address = self._endpoints.address()
            try:
                return await self._start(method, request, address, attempts)
            except grpc.aio.AioRpcError as broken:
                error = failure(broken)
            except asyncio.CancelledError:
                if _is_ours():
                    raise
                error = cancelled_by_peer("reset")
            await self._pause(error, address, attempts)

    def _start(self, method: Callable[[Any], Any], request: Any, address: str, attempts: Attempts) -> Any:
        metadata = self._endpoints.metadata(attempts.request_id)
        call = method(InferenceServiceStub(self._channel(address)))
        return call(request, timeout=attempts.left_s(time.monotonic()), metadata=metadata)

    async def _pause(self, error: StagelineError, address: str, attempts: Attempts) -> None:
        """Wait before the next attempt, or raise."""
        if not self._closed.is_set():
            wait_s = attempts.wait_s(error, time.monotonic(), random.random())
            self._endpoints.failed(address, error, wait_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._closed.wait()
        if self._closed.is_set():
            raise closed()

    def _channel(self, address: str) -> grpc.aio.Channel:
        tls, options = self._endpoints.tls, self._endpoints.options
        if self._closed.is_set():
            raise closed()
        if address not in self._channels:
            self._channels[address] = (
                grpc.aio.insecure_channel(address, options=options)
                if tls is None
                else grpc.aio.secure_channel(address, tls.credentials(), options=options)
            )
        return self._channels[address]


def _is_ours() -> bool:
    """Whether this task is being cancelled. gRPC raises CancelledError for a status CANCELLED and a closed channel too."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def _merged(calls: Sequence[AsyncIterator[pb.StreamGenerateResponse]]) -> AsyncGenerator[Any, None]:
    """As in `sync`."""
    arrived: asyncio.Queue[pb.StreamGenerateResponse | BaseException | None] = asyncio.Queue()

    async def pump(call: AsyncIterator[pb.StreamGenerateResponse]) -> None:
        try:
            async for message in call:
                arrived.put_nowait(message)
            arrived.put_nowait(None)
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pump(call)) for call in calls]
    num_open = len(calls)
    try:
        while num_open:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
