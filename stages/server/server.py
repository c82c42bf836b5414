"""The stage server: control calls change who may send steps; the current epoch receives, computes and sends them.

A bindable replica has a loader, and begins without a stage: `Bind` loads one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stageline.errors import InvalidArgumentError, StagelineError, UnavailableError
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.executor import StageExecutor
from stages.partition import LayerRange
from stages.server.abort import abort
from stages.server.access import OPEN, StageAccess
from stages.server.claims import Bind, Claims, State
from stages.server.epoch import Epoch, EpochOverError
from stages.server.link import OPTIONS, Link
from stages.server.listen import take_port
from stages.server.loader import StageLoader
from stages.server.streams import DataStreams
from stages.spec import DEFAULT_QUEUE_DEPTH_STEPS, DEFAULT_SHARED_MEMORY_BYTES

_LOG = logging.getLogger(__name__)

LEASE_POLL_S = 0.2
DRAIN_POLL_S = 0.05
_SERVICES = ("", "stageline.stage.v1.StageService")
_STATES = {
    State.UNBOUND: pb.STAGE_STATE_UNBOUND,
    State.LOADING: pb.STAGE_STATE_LOADING,
    State.SPARE: pb.STAGE_STATE_SPARE,
    State.CLAIMED: pb.STAGE_STATE_CLAIMED,
    State.CONNECTED: pb.STAGE_STATE_CONNECTED,
    State.DRAINING: pb.STAGE_STATE_DRAINING,
}


class Listener:
    """A port, taken before the weights load so that a wrong one is heard of at once; served when `StageServer` starts."""

    def __init__(self, host: str, port: int, access: StageAccess = OPEN) -> None:
        """Raises ConfigError where the port cannot be had; see `take_port`."""
        self.access = access
        self.server = access.server((*OPTIONS, ("grpc.so_reuseport", 0)))
        self.port = take_port(access.bind(self.server), host, port)


class StageServer(pb_grpc.StageServiceServicer):
    """Serves one StageExecutor at a time. All methods run on the loop that called `start`."""

    def __init__(
        self,
        executor: StageExecutor | None,
        *,
        fingerprint: str,
        kv_capacity_blocks: int = 0,
        queue_depth_steps: int = DEFAULT_QUEUE_DEPTH_STEPS,
        shared_memory_bytes: int = DEFAULT_SHARED_MEMORY_BYTES,
        loader: StageLoader | None = None,
    ) -> None:
        """Without an executor, which takes a `loader`, the replica is unbound. Of `shared_memory_bytes` is the ring to a next
        stage on this host; 0 neither offers nor takes one."""
        assert executor is not None or loader is not None, "nothing to serve, and nothing to load it with"
        self.incarnation = uuid.uuid4().hex
        self._executor = executor
        self._fingerprint, self._capacity, self._depth = fingerprint, kv_capacity_blocks, queue_depth_steps
        self._shared_memory_bytes = shared_memory_bytes
        self._loader = loader
        self._loading: tuple[LayerRange, int, int] | None = None  # what loads, bytes of it that are there, bytes in all
        self._load_failure = ""
        self._stopped = False
        held = (0, 0)
        if executor is not None:
            held = executor.runner.layers.start_layer, executor.runner.layers.end_layer
        self._claims = Claims(
            incarnation=self.incarnation, bindable=loader is not None, bound=executor is not None, layers=held
        )
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage-compute")
        self._epoch = self._wired = Epoch(0, self._compute, queue_depth_steps)  # current; last one connected
        self._leases: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: grpc.aio.Server | None = None
        self._access = OPEN
        self.failure: BaseException | None = None
        self._drain_ends_s = 0.0  # on the monotonic clock

    async def start(self, host: str, port: int, access: StageAccess = OPEN) -> int:
        """Listen; returns the port. Raises ConfigError where it cannot be had."""
        return await self.start_on(Listener(host, port, access))

    async def start_on(self, listener: Listener) -> int:
        """Serve on a port that was taken before; returns it."""
        server = self._server = listener.server
        self._access = listener.access
        pb_grpc.add_StageServiceServicer_to_server(self, server)
        streams = DataStreams(
            self._admit,
            lambda epoch: self._claims.stale(epoch),
            is_last=lambda: self._held().runner.model.is_last,
            max_payload_bytes=lambda: self._held().max_payload_bytes(),
            shares_memory=self._shared_memory_bytes > 0,
        )
        server.add_generic_rpc_handlers((streams.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await server.start()
        await self._set_health()
        self._leases = asyncio.create_task(self._lease_loop())
        return listener.port

    async def drain(self, timeout_s: float = 0.0) -> None:
        """Take no new claim, and tell the owner that so many seconds are left; returns at once."""
        self._claims = self._claims.drain()
        self._drain_ends_s = time.monotonic() + timeout_s
        self._epoch.publish(self._draining())
        await self._set_health()

    async def drained(self) -> None:
        """Return once nobody owns this stage, or the time that `drain` gave is up."""
        while self._claims.owner_id and time.monotonic() < self._drain_ends_s:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)

    async def stop(self) -> None:
        """End everything; the running kernel finishes first."""
        self._stopped = True
        if self._leases is not None:
            self._leases.cancel()
        await self._epoch.end()
        if self._server is not None:
            await self._server.stop(grace=0.2)
        await asyncio.to_thread(self._compute.shutdown)

    def busy_s(self) -> float:
        """How long the running kernel has been running, also where its epoch is over; 0 while idle."""
        since_s = self._wired.running_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def _held(self) -> StageExecutor:
        """The stage. Raises FailedPreconditionError where there is none; every epoch that is connected has one."""
        self._claims.check_bound()
        assert self._executor is not None
        return self._executor

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """See StageService."""
        claims = self._claims
        answer = pb.DescribeResponse() if self._loader is None else self._loader.description()
        if claims.bound:
            answer.MergeFrom(self._described(self._held()))
        if self._loading is not None:
            layers, done_bytes, total_bytes = self._loading
            answer.loading.start_layer, answer.loading.end_layer = layers.start_layer, layers.end_layer
            answer.loading.done_bytes, answer.loading.total_bytes = done_bytes, total_bytes
        answer.MergeFrom(
            pb.DescribeResponse(
                incarnation=self.incarnation,
                fingerprint=self._fingerprint,
                queue_depth_steps=self._depth,
                epoch=claims.epoch,
                owner_id=claims.owner_id,
                state=_STATES[claims.state],
                pid=os.getpid(),
                busy_s=self.busy_s(),
                bindable=claims.bindable,
                load_failure=self._load_failure,
            )
        )
        return answer

    def _described(self, executor: StageExecutor) -> pb.DescribeResponse:
        runner = executor.runner
        return pb.DescribeResponse(
            start_layer=runner.layers.start_layer,
            end_layer=runner.layers.end_layer,
            num_layers=runner.config.num_layers,
            hidden_size=runner.config.hidden_size,
            vocab_size=runner.config.vocab_size,
            dtype=executor.element_type,
            block_size_tokens=runner.block_size_tokens,
            kv_capacity_blocks=self._capacity,
            attention_backend=runner.attention_report,
            batch_invariant=runner.model.batch_invariant,
            quantization=runner.quantization or "",
            hidden_dtype=executor.hidden_states.element_type,
        )

    async def Bind(self, request: pb.BindRequest, context: Any) -> pb.BindResponse:
        """See StageService. Who was first is decided here; what takes time goes on in the background."""
        layers = LayerRange(request.start_layer, request.end_layer)
        asked = Bind(request.owner_id, request.epoch, layers.start_layer, layers.end_layer)
        try:
            claims = self._claims.bind(
                asked, incarnation=request.incarnation, lease_s=request.lease_s, now_s=time.monotonic()
            )
            if claims is not self._claims:
                assert self._loader is not None
                self._loader.check(layers)
                self._claims, self._loading, self._load_failure = claims, (layers, 0, 0), ""
                self._run(self._load(self._loader, layers, self._swap_epoch()))
        except StagelineError as error:
            await abort(context, error)
        return pb.BindResponse(epoch=claims.epoch)

    async def _load(self, loader: StageLoader, layers: LayerRange, old: Epoch) -> None:
        """Let go of what is held, which is in no pipeline any more, and load."""

        def progress(done_bytes: int, total_bytes: int) -> None:
            if self._stopped:
                raise UnavailableError("STAGE_STOPPED", "the replica stops")
            self._loading = layers, done_bytes, total_bytes

        try:
            await self._end(old)
            self._executor, self._capacity, self._wired = None, 0, self._epoch
            gc.collect()  # memory of the stage before must be free before the next one is loaded
            loaded = await loader.load(layers, progress)
        except Exception as error:  # whatever it is, the replica can be bound to something else
            reason = error.reason if isinstance(error, StagelineError) else type(error).__name__
            self._load_failure = f"{reason}: {error}"
            _LOG.error("layers %s could not be loaded: %s", layers, self._load_failure, extra={"layers": str(layers)})
            self._claims, self._loading = self._claims.load_failed(), None
            await self._next_epoch()
        else:
            self._executor, self._capacity = loaded.executor, loaded.kv_capacity_blocks
            self._claims, self._loading = self._claims.loaded(), None

    async def Claim(self, request: pb.ClaimRequest, context: Any) -> pb.ClaimResponse:
        """See StageService. The epoch changes first, so nothing of the old one is started any more."""
        try:
            self._claims = self._claims.claim(
                owner_id=request.owner_id,
                incarnation=request.incarnation,
                min_epoch=request.min_epoch,
                lease_s=request.lease_s,
                now_s=time.monotonic(),
                layers=(request.start_layer, request.end_layer) if request.end_layer else None,
            )
        except StagelineError as error:
            await abort(context, error)
        granted, wired = self._claims.epoch, self._wired
        await self._next_epoch()
        return pb.ClaimResponse(epoch=granted, previous_epoch=wired.number, last_executed_step=wired.executed_step)

    async def Connect(self, request: pb.ConnectRequest, context: Any) -> pb.ConnectResponse:
        """See StageService. The epoch is checked again after every wait: a slow Connect must not touch a newer epoch."""
        link = None
        try:
            epoch, executor = self._admit(request.epoch, self.incarnation), self._held()
            self._check_connect(request, executor)
            await self._on_compute_thread(executor.allocate_kv, request.num_blocks)
            self._admit(request.epoch, self.incarnation)
            if request.HasField("next"):
                following = request.next
                link = Link(
                    following.address,
                    following.epoch,
                    following.incarnation,
                    epoch.publish,
                    self._access,
                    self._shared_memory_bytes,
                )
                await epoch.until_over(link.open())
            self._claims = self._claims.connect(epoch=request.epoch, now_s=time.monotonic())
        except (StagelineError, EpochOverError, asyncio.CancelledError) as error:
            if link is not None:
                await link.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            await abort(context, error if isinstance(error, StagelineError) else self._claims.stale(request.epoch))
        self._wired = epoch
        await epoch.connect(executor, link, self._on_failure)
        return pb.ConnectResponse()

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        """See StageService."""
        try:
            self._claims = self._claims.renew(
                epoch=request.epoch, incarnation=request.incarnation, now_s=time.monotonic()
            )
        except StagelineError as error:
            await abort(context, error)
        return pb.RenewResponse(last_executed_step=self._epoch.executed_step, running_step=self._epoch.running_step)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        """See StageService."""
        try:
            self._claims = self._claims.release(
                epoch=request.epoch, incarnation=request.incarnation, now_s=time.monotonic()
            )
        except StagelineError as error:
            await abort(context, error)
        await self._next_epoch()
        return pb.ReleaseResponse()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        """See StageService. Ends with STALE_EPOCH when the epoch does."""
        try:
            epoch = self._admit(request.epoch, request.incarnation)
        except StagelineError as error:
            await abort(context, error)
        events = asyncio.Queue[pb.WatchResponse]()
        epoch.watchers.add(events)
        if self._claims.draining:
            events.put_nowait(self._draining())
        try:
            yield pb.WatchResponse(watching=pb.Watching())
            while True:
                yield await epoch.until_over(events.get())
        except EpochOverError:
            await abort(context, self._claims.stale(request.epoch))
        finally:
            epoch.watchers.discard(events)

    def _draining(self) -> pb.WatchResponse:
        remaining_s = max(0.0, self._drain_ends_s - time.monotonic())
        return pb.WatchResponse(draining=pb.Draining(remaining_s=remaining_s))

    def _admit(self, epoch: int, incarnation: str) -> Epoch:
        """The current epoch, if that is what is meant and its lease runs."""
        self._claims.check(epoch=epoch, incarnation=incarnation, now_s=time.monotonic())
        assert self._epoch.number == epoch
        return self._epoch

    def _check_connect(self, request: pb.ConnectRequest, executor: StageExecutor) -> None:
        if executor.runner.model.is_last == request.HasField("next"):
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

    async def _lease_loop(self) -> None:
        while True:
            await asyncio.sleep(LEASE_POLL_S)
            claims = self._claims.expire(time.monotonic())
            if claims is not self._claims:
                self._claims = claims
                await self._next_epoch()

    async def _next_epoch(self) -> None:
        """End the current epoch and wait for the running kernel; `_claims` already has the new number."""
        await self._end(self._swap_epoch())

    def _swap_epoch(self) -> Epoch:
        """Begin the epoch that `_claims` says; returns the one before, which is still to be ended."""
        old, self._epoch = self._epoch, Epoch(self._claims.epoch, self._compute, self._depth)
        return old

    async def _end(self, old: Epoch) -> None:
        await old.end()
        await self._on_compute_thread(self._reset)  # one thread: this comes after the kernel
        old.let_go()

    def _reset(self) -> None:
        if (executor := self._executor) is not None:
            executor.reset()

    async def _on_compute_thread(self, function: Any, *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._compute, function, *args)

    def _on_failure(self, error: BaseException) -> None:
        """Computing broke: this stage must not look alive to its owner."""
        self.failure = error
        self._claims = self._claims.fail(f"{type(error).__name__}: {error}")
        for work in (self._next_epoch(), self._set_health()):
            self._run(work)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """In the background."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _set_health(self) -> None:
        """SERVING means: can be claimed, or computes for its owner and will go on."""
        status = health_pb2.HealthCheckResponse
        serving = self._claims.state is not State.DRAINING
        for service in _SERVICES:
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)
