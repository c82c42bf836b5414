"""The blocking client."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc

from stageline.client.attempts import Attempts, closed, ended_early, failure
from stageline.client.backoff import Backoff
from stageline.client.collect import Collector
from stageline.client.connection import ChannelOptions, Endpoints, Tls, name_of_request
from stageline.client.progress import Progress, is_ranked
from stageline.errors import StagelineError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import scoring_pb2 as scoring
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

Answer = TypeVar("Answer")


class Client:
    """Calls InferenceService at the first of `addresses` that answers. Safe to use from several threads.

    `timeout_s` of a call bounds all of its attempts together; without it a call waits as long as it takes. Every method
    raises the typed errors of `stageline.errors`, with the request's name in `metadata["request_id"]`; UNAVAILABLE, and
    RESOURCE_EXHAUSTED where the server said when to come back, only once the deadline is near. What is tried again is
    logged to "stageline.client".
    """

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
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; running calls end with FailedPreconditionError (CLIENT_CLOSED)."""
        with self._lock:
            self._closed.set()
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()

    def stream_generate(
        self, generation: gen.Generation, *, timeout_s: float | None = None
    ) -> Generator[pb.StreamGenerateResponse, None, None]:
        """One `start`, deltas, one `usage`, as if no gateway had ever died. Closing the iterator cancels the request.

        The request is sent, and `timeout_s` begins, with the first `next`. A stream that breaks is resumed where it was,
        all of its unfinished choices at once.
        """
        progress = Progress(generation)
        attempts = self._attempts(timeout_s, generation.request_id)
        while not progress.finished:
            address = self._endpoints.address()
            try:
                with closing(self._open(progress.requests(), address, attempts)) as messages:
                    for message in messages:
                        if (fresh := progress.receive(message)) is not None:
                            attempts.received(fresh)
                            yield fresh
                error = ended_early(progress)
            except grpc.RpcError as broken:
                error = failure(broken)
            if not progress.finished:  # else only `usage` is lost
                self._pause(error, address, attempts)
        yield progress.last()

    def generate(self, generation: gen.Generation, *, timeout_s: float | None = None) -> pb.GenerateResponse:
        """The whole answer. Streams inside, so that a gateway that dies costs no token here either; only `best_of`, which
        cannot be streamed, is begun again."""
        if is_ranked(generation):
            whole = pb.GenerateRequest(generation=generation)
            return self._unary(lambda stub: stub.Generate, whole, timeout_s, generation.request_id)
        collector = Collector()
        for message in self.stream_generate(generation, timeout_s=timeout_s):
            collector.take(message)
        return collector.answer()

    def score(self, request: scoring.ScoreRequest, *, timeout_s: float | None = None) -> scoring.ScoreResponse:
        """Log-probabilities of continuations of one context; begun again where the gateway dies."""
        return self._unary(lambda stub: stub.Score, request, timeout_s, request.request_id)

    def tokenize(
        self, request: pb.TokenizeRequest, *, timeout_s: float | None = None, request_id: str = ""
    ) -> pb.TokenizeResponse:
        """Token ids of text or of a conversation."""
        return self._unary(lambda stub: stub.Tokenize, request, timeout_s, request_id)

    def detokenize(
        self, request: pb.DetokenizeRequest, *, timeout_s: float | None = None, request_id: str = ""
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return self._unary(lambda stub: stub.Detokenize, request, timeout_s, request_id)

    def get_model(self, *, timeout_s: float | None = None, request_id: str = "") -> pb.GetModelResponse:
        """The model and what serves it."""
        return self._unary(lambda stub: stub.GetModel, pb.GetModelRequest(), timeout_s, request_id)

    def _attempts(self, timeout_s: float | None, request_id: str) -> Attempts:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        return Attempts(self._backoff, deadline_s, name_of_request(request_id))

    def _open(
        self, generations: Sequence[gen.Generation], address: str, attempts: Attempts
    ) -> Generator[pb.StreamGenerateResponse, None, None]:
        """The messages of several streams as they come; all are cancelled when it is closed or one fails."""
        calls: list[Any] = []
        try:
            for generation in generations:
                request = pb.StreamGenerateRequest(generation=generation)
                calls.append(self._start(lambda stub: stub.StreamGenerate, request, address, attempts))
            yield from calls[0] if len(calls) == 1 else _merged(calls)
        finally:
            for call in calls:
                call.cancel()  # nothing after the end

    def _unary(
        self,
        method: Callable[[InferenceServiceStub], Callable[..., Answer]],
        request: Any,
        timeout_s: float | None,
        request_id: str,
    ) -> Answer:
        attempts = self._attempts(timeout_s, request_id)
        while True:
            address = self._endpoints.address()
            try:
                return self._start(method, request, address, attempts)
            except grpc.RpcError as error:
                self._pause(failure(error), address, attempts)

    def _start(
        self,
        method: Callable[[InferenceServiceStub], Callable[..., Answer]],
        request: Any,
        address: str,
        attempts: Attempts,
    ) -> Answer:
        metadata = self._endpoints.metadata(attempts.request_id)
        call = method(InferenceServiceStub(self._channel(address)))
        try:
            return call(request, timeout=attempts.left_s(time.monotonic()), metadata=metadata)
        except ValueError:  # the channel was closed since
            if self._closed.is_set():
                raise closed() from None
            raise

    def _pause(self, error: StagelineError, address: str, attempts: Attempts) -> None:
        """Wait before the next attempt, or raise."""
        if not self._closed.is_set():
            wait_s = attempts.wait_s(error, time.monotonic(), random.random())
            self._endpoints.failed(address, error, wait_s)
            self._closed.wait(wait_s)
        if self._closed.is_set():
            raise closed()

    def _channel(self, address: str) -> grpc.Channel:
        tls, options = self._endpoints.tls, self._endpoints.options
        with self._lock:
            if self._closed.is_set():
                raise closed()
            if address not in self._channels:
                self._channels[address] = (
                    grpc.insecure_channel(address, options=options)
                    if tls is None
                    else grpc.secure_channel(address, tls.credentials(), options=options)
                )
            return self._channels[address]


def _merged(calls: Sequence[Iterator[pb.StreamGenerateResponse]]) -> Generator[pb.StreamGenerateResponse, None, None]:
    """Messages of several calls as they come. The queue has no bound, so that no call waits for another; it holds at most
    the answers. Cancelled calls end their threads."""
    arrived: SimpleQueue[pb.StreamGenerateResponse | grpc.RpcError | None] = SimpleQueue()

    def pump(call: Iterator[pb.StreamGenerateResponse]) -> None:
        try:
            for message in call:
                arrived.put(message)
            arrived.put(None)
        except grpc.RpcError as error:
            arrived.put(error)

    for call in calls:
        threading.Thread(target=pump, args=(call,), name="stageline-client", daemon=True).start()
    num_open = len(calls)
    while num_open:
        item = arrived.get()
        if isinstance(item, grpc.RpcError):
            raise item
        if item is None:
            num_open -= 1
        else:
            yield item
