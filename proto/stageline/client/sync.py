"""The blocking client."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from stageline.client.attempts import Attempts
from stageline.client.backoff import Backoff
from stageline.client.collect import Collector
from stageline.client.connection import OPTIONS, Endpoints, Tls
from stageline.client.progress import Progress
from stageline.grpc_errors import from_rpc_error
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

Answer = TypeVar("Answer")


class Client:
    """Calls InferenceService at the first of `addresses` that answers. Safe to use from several threads.

    `timeout_s` of a call bounds all of its attempts together; without it a call waits as long as it takes. Every method
    raises the typed errors of `stageline.errors`; UNAVAILABLE and RESOURCE_EXHAUSTED only once the deadline is near.
    """

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
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; running calls end with an error."""
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()

    def stream_generate(
        self, generation: gen.Generation, *, timeout_s: float | None = None
    ) -> Iterator[pb.StreamGenerateResponse]:
        """One `start`, deltas, one `usage`, as if no gateway had ever died. Closing the iterator cancels the request.

        A stream that breaks is resumed where it was, its choices one after the other.
        """
        progress = Progress(generation)
        attempts = Attempts(self._backoff, _deadline(timeout_s))
        usage: gen.Usage | None = None
        while not progress.finished:
            try:
                for request in progress.requests():
                    for message in self._open(request, attempts):
                        attempts.progressed()
                        if message.HasField("start") and not progress.begin(message.start):
                            continue  # of a resumed stream: the caller has one already
                        usage = message.usage if message.HasField("usage") else usage
                        for delta in message.choices:
                            progress.take(delta)
                        if not message.HasField("usage"):
                            yield message
            except grpc.RpcError as error:
                if not progress.finished:
                    self._wait(error, attempts)
        yield pb.StreamGenerateResponse(usage=progress.usage(usage))

    def generate(self, generation: gen.Generation, *, timeout_s: float | None = None) -> pb.GenerateResponse:
        """The whole answer. Streams inside, so that a gateway that dies costs no token here either."""
        collector = Collector()
        for message in self.stream_generate(generation, timeout_s=timeout_s):
            collector.take(message)
        return collector.answer()

    def tokenize(self, request: pb.TokenizeRequest, *, timeout_s: float | None = None) -> pb.TokenizeResponse:
        """Token ids of text or of a conversation."""
        return self._unary(lambda stub: stub.Tokenize, request, timeout_s)

    def detokenize(self, request: pb.DetokenizeRequest, *, timeout_s: float | None = None) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return self._unary(lambda stub: stub.Detokenize, request, timeout_s)

    def get_model(self, *, timeout_s: float | None = None) -> pb.GetModelResponse:
        """The model and what serves it."""
        return self._unary(lambda stub: stub.GetModel, pb.GetModelRequest(), timeout_s)

    def _open(self, generation: gen.Generation, attempts: Attempts) -> Iterator[pb.StreamGenerateResponse]:
        call: Any = self._stub(attempts.number).StreamGenerate(
            pb.StreamGenerateRequest(generation=generation),
            timeout=attempts.left_s(time.monotonic()),
            metadata=self._endpoints.metadata,
        )
        try:
            yield from call
        finally:
            call.cancel()  # where the caller has stopped to listen; nothing after the end

    def _unary(
        self, method: Callable[[InferenceServiceStub], Callable[..., Answer]], request: Any, timeout_s: float | None
    ) -> Answer:
        attempts = Attempts(self._backoff, _deadline(timeout_s))
        while True:
            try:
                call = method(self._stub(attempts.number))
                return call(request, timeout=attempts.left_s(time.monotonic()), metadata=self._endpoints.metadata)
            except grpc.RpcError as error:
                self._wait(error, attempts)

    def _wait(self, error: grpc.RpcError, attempts: Attempts) -> None:
        time.sleep(attempts.wait_s(from_rpc_error(error), time.monotonic(), random.random()))

    def _stub(self, attempt: int) -> InferenceServiceStub:
        address, tls = self._endpoints.address(attempt), self._endpoints.tls
        with self._lock:
            if address not in self._channels:
                self._channels[address] = (
                    grpc.insecure_channel(address, options=OPTIONS)
                    if tls is None
                    else grpc.secure_channel(address, tls.credentials(), options=OPTIONS)
                )
            return InferenceServiceStub(self._channels[address])


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s
