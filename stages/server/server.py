"""The stage server: receives steps, has them computed on one thread, sends them on. Control calls change who may.

One asyncio loop receives and sends; one thread computes, in order. Queues are as deep as the steps a gateway may have
in flight, so a full queue means a neighbour is slow, and flow control carries that back to the gateway.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from stageline.errors import ConfigError, FailedPreconditionError, InvalidArgumentError, StagelineError
from stageline.grpc_errors import to_status
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.executor import StageExecutor
from stages.server.claims import Claims, State
from stages.server.frames import Assembler, StepFrame
from stages.server.link import DATA_SERVICE, OPTIONS, Link

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_STATES = {
    State.SPARE: pb.STAGE_STATE_SPARE,
    State.CLAIMED: pb.STAGE_STATE_CLAIMED,
    State.CONNECTED: pb.STAGE_STATE_CONNECTED,
    State.DRAINING: pb.STAGE_STATE_DRAINING,
}


class StageServer(pb_grpc.StageServiceServicer):
    """Serves one StageExecutor. All methods run on the loop that called `start`."""

    def __init__(
        self, executor: StageExecutor, *, fingerprint: str, kv_capacity_blocks: int, queue_depth_steps: int = 8
    ) -> None:
        self.incarnation = uuid.uuid4().hex
        self._executor = executor
        self._fingerprint, self._capacity, self._depth = fingerprint, kv_capacity_blocks, queue_depth_steps
        self._claims = Claims(incarnation=self.incarnation)
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage-compute")
        self._inbox: asyncio.Queue[tuple[StepFrame, int]] = asyncio.Queue(queue_depth_steps)
        self._outbox: asyncio.Queue[StepFrame] = asyncio.Queue(queue_depth_steps)
        self._running = asyncio.Lock()  # held while a step is computed
        self._epoch_over = asyncio.Event()  # replaced with each epoch; set when it ends
        self._executed_step = self._running_step = 0
        self._watchers: set[asyncio.Queue[pb.WatchResponse]] = set()
        self._link: Link | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._server = grpc.aio.server(options=(*OPTIONS, ("grpc.so_reuseport", 0)))
        self.failure: BaseException | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises ConfigError where it is taken."""
        pb_grpc.add_StageServiceServicer_to_server(self, self._server)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    DATA_SERVICE,
                    {
                        "Forward": grpc.stream_unary_rpc_method_handler(self._forward),
                        "Results": grpc.unary_stream_rpc_method_handler(self._results),
                    },
                ),
            )
        )
        servicer = _aio_health()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        try:
            port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise ConfigError(
                "PORT_IN_USE",
                f"cannot listen on {host}:{port}; stop what listens there or choose another port",
                port=port,
            ) from None
        await self._server.start()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        self._tasks = [asyncio.create_task(loop()) for loop in (self._compute_loop, self._send_loop, self._lease_loop)]
        return port

    async def drain(self) -> None:
        """Take no new claim and tell the owner."""
        self._claims = self._claims.drain()
        self._publish(pb.WatchResponse(draining=pb.Draining()))

    async def stop(self) -> None:
        """End everything; the running kernel finishes first."""
        self._epoch_over.set()
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            await self._link.close()
        await self._server.stop(grace=0.2)
        self._compute.shutdown(wait=True)

    # Control.

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """See StageService."""
        config, layers = self._executor.runner.config, self._executor.runner.layers
        return pb.DescribeResponse(
            incarnation=self.incarnation,
            fingerprint=self._fingerprint,
            start_layer=layers.start_layer,
            end_layer=layers.end_layer,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=self._executor.element_type,
            block_size_tokens=self._executor.runner.block_size_tokens,
            kv_capacity_blocks=self._capacity,
            queue_depth_steps=self._depth,
            epoch=self._claims.epoch,
            owner_id=self._claims.owner_id,
            state=_STATES[self._claims.state],
            pid=os.getpid(),
            attention_backend=self._executor.runner.attention_report,
            batch_invariant=self._executor.runner.model.batch_invariant,
        )

    async def Claim(self, request: pb.ClaimRequest, context: Any) -> pb.ClaimResponse:
        """See StageService. The epoch changes first, so nothing of the old one is started any more."""
        try:
            before = self._claims
            self._claims = before.claim(
                owner_id=request.owner_id,
                incarnation=request.incarnation,
                min_epoch=request.min_epoch,
                lease_s=request.lease_s,
                now_s=time.monotonic(),
            )
        except StagelineError as error:
            await _abort(context, error)
        granted = self._claims.epoch
        await self._end_epoch()
        executed, self._executed_step = self._executed_step, 0
        return pb.ClaimResponse(epoch=granted, previous_epoch=before.epoch, last_executed_step=executed)

    async def Connect(self, request: pb.ConnectRequest, context: Any) -> pb.ConnectResponse:
        """See StageService."""
        try:
            self._claims.check(epoch=request.epoch, now_s=time.monotonic())
            last = self._executor.runner.model.is_last
            if last == request.HasField("next"):
                raise InvalidArgumentError(
                    "NEXT_STAGE_MISMATCH",
                    "the last stage takes no next stage and every other stage needs one",
                    field="next",
                )
            if not 0 < request.num_blocks <= self._capacity:
                raise InvalidArgumentError(
                    "NUM_BLOCKS_OUT_OF_RANGE", f"num_blocks must be in [1, {self._capacity}], got {request.num_blocks}",
                    field="num_blocks", value=request.num_blocks,
                )  # fmt: skip
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compute, self._executor.allocate_kv, request.num_blocks)
            if not last:
                link = Link(request.next.address, request.next.epoch, request.next.incarnation, self._on_link_broken)
                await link.open()
                self._link = link
            self._claims = self._claims.connect(epoch=request.epoch, now_s=time.monotonic())
        except StagelineError as error:
            await _abort(context, error)
        return pb.ConnectResponse()

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        """See StageService."""
        try:
            self._claims = self._claims.renew(
                epoch=request.epoch, incarnation=request.incarnation, now_s=time.monotonic()
            )
        except StagelineError as error:
            await _abort(context, error)
        return pb.RenewResponse(last_executed_step=self._executed_step, running_step=self._running_step)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        """See StageService."""
        try:
            self._claims = self._claims.release(
                epoch=request.epoch, incarnation=request.incarnation, now_s=time.monotonic()
            )
        except StagelineError as error:
            await _abort(context, error)
        await self._end_epoch()
        return pb.ReleaseResponse()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        """See StageService. Ends with STALE_EPOCH when the epoch does."""
        try:
            self._claims.check(epoch=request.epoch, incarnation=request.incarnation, now_s=time.monotonic())
        except StagelineError as error:
            await _abort(context, error)
        over, events = self._epoch_over, asyncio.Queue[pb.WatchResponse]()
        self._watchers.add(events)
        try:
            yield pb.WatchResponse(watching=pb.Watching())
            while (event := await _until(over, events.get())) is not None:
                yield event
            await _abort(context, self._stale(request.epoch))
        finally:
            self._watchers.discard(events)

    # Data.

    async def _forward(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            epoch = self._stream_epoch(context)
            over, assembler = self._epoch_over, Assembler()
            while True:
                message = await _until(over, context.read())
                if message is None:
                    raise self._stale(epoch)
                if message is _EOF:
                    return b""
                frame = assembler.feed(message)
                if frame is None:
                    continue
                if frame.epoch != epoch:
                    raise self._stale(frame.epoch)
                await _until(over, self._inbox.put((frame, time.monotonic_ns())))
        except StagelineError as error:
            await _abort(context, error)
        raise AssertionError("abort does not return")

    async def _results(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            epoch = self._stream_epoch(context)
            if not self._executor.runner.model.is_last:
                raise FailedPreconditionError("NOT_LAST_STAGE", "results come from the last stage only")
        except StagelineError as error:
            await _abort(context, error)
        over = self._epoch_over
        while (frame := await _until(over, self._outbox.get())) is not None:
            yield frame.header
        await _abort(context, self._stale(epoch))

    async def _compute_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            frame, received_ns = await self._inbox.get()
            async with self._running:
                if frame.epoch != self._claims.epoch:
                    continue
                self._running_step = frame.step_id
                try:
                    out = await loop.run_in_executor(self._compute, self._executor.execute, frame, received_ns)
                except Exception as error:  # a bug of ours: this stage must not look alive to its owner
                    self.failure = error
                    self._claims = self._claims.drain()
                    self._epoch_over.set()
                    raise
                self._running_step, self._executed_step = 0, frame.step_id
            if frame.epoch == self._claims.epoch:
                await _until(self._epoch_over, self._outbox.put(out))

    async def _send_loop(self) -> None:
        if self._executor.runner.model.is_last:
            return  # results leave through `_results`
        while True:
            frame = await self._outbox.get()
            if frame.epoch == self._claims.epoch and self._link is not None:
                await _until(self._epoch_over, self._link.send(frame))

    async def _lease_loop(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            claims = self._claims.expire(time.monotonic())
            if claims is not self._claims:
                self._claims = claims
                await self._end_epoch()

    async def _end_epoch(self) -> None:
        """Drop what is queued, end the streams of the old epoch, wait for the running kernel."""
        self._epoch_over.set()
        self._epoch_over = asyncio.Event()
        for queue in (self._inbox, self._outbox):
            while not queue.empty():
                queue.get_nowait()
        if self._link is not None:
            link, self._link = self._link, None
            await link.close()
        async with self._running:
            self._executor.reset()

    def _stream_epoch(self, context: Any) -> int:
        metadata = dict(context.invocation_metadata())
        epoch = metadata.get("stageline-epoch", "")
        if not epoch.isascii() or not epoch.isdigit():
            raise InvalidArgumentError("EPOCH_MISSING", "the stream needs the metadata stageline-epoch")
        incarnation = metadata.get("stageline-incarnation", "")
        self._claims.check(epoch=int(epoch), incarnation=incarnation, now_s=time.monotonic())
        return int(epoch)

    def _on_link_broken(self, address: str, detail: str) -> None:
        self._publish(pb.WatchResponse(link_broken=pb.LinkBroken(address=address, detail=detail)))

    def _publish(self, event: pb.WatchResponse) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(event)

    def _stale(self, epoch: int) -> FailedPreconditionError:
        return FailedPreconditionError(
            "STALE_EPOCH", f"epoch {epoch} is over: the stage is in epoch {self._claims.epoch}; claim it again",
            epoch=epoch, current_epoch=self._claims.epoch,
        )  # fmt: skip


def _aio_health() -> Any:
    return health.aio.HealthServicer()  # type: ignore[attr-defined]


async def _until(over: asyncio.Event, work: Any) -> Any:
    """The result of `work`, or None as soon as the epoch is over."""
    task, ended = asyncio.ensure_future(work), asyncio.ensure_future(over.wait())
    try:
        await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        ended.cancel()
        if not task.done():
            task.cancel()


async def _abort(context: Any, error: StagelineError) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
