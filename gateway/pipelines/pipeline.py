"""One pipeline: claims its stages under one epoch, wires them, streams steps in and results out, notices when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from gateway.pipelines.form import Chain
from stageline.errors import StagelineError, UnavailableError
from stageline.grpc_errors import from_rpc_error
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.server.frames import StepFrame, encode
from stages.server.link import FORWARD, OPTIONS, RESULTS, epoch_metadata

RPC_TIMEOUT_S = 30.0


class Pipeline:
    """A chain of stages under one epoch. After `broken` is set it is of no use any more: close it and open another."""

    def __init__(self, stages: Chain, *, owner_id: str, lease_s: float) -> None:
        self.stages = stages
        self.epoch = 0
        self.num_blocks = self.block_size_tokens = self.max_in_flight = 0
        self.broken = asyncio.Event()
        self.cause: StagelineError | None = None
        self._owner_id, self._lease_s = owner_id, lease_s
        self._channels = [grpc.aio.insecure_channel(stage.address, options=OPTIONS) for stage in stages]
        self._stubs = [pb_grpc.StageServiceStub(channel) for channel in self._channels]
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox: asyncio.Queue[StepFrame] = asyncio.Queue()

    async def open(self, on_result: Callable[[pb.StepResult], None]) -> None:
        """Claim and wire every stage. Raises StagelineError where one refuses or does not answer."""
        try:
            described = await asyncio.gather(*(s.Describe(pb.DescribeRequest(), timeout=5) for s in self._stubs))
            self.block_size_tokens = described[0].block_size_tokens
            self._check(described)
            self.num_blocks = min(stage.kv_capacity_blocks for stage in described)
            # In flight: one step a stage and one to hide the hops, never more than a queue holds.
            self.max_in_flight = min(len(self.stages) + 1, *(stage.queue_depth_steps for stage in described))
            await self._claim()
            self._spawn(self._renew())
            await self._connect()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        first, last = self.stages[0], self.stages[-1]
        method: Any = self._channels[0].stream_unary(FORWARD, request_serializer=None, response_deserializer=None)
        forward = method(metadata=epoch_metadata(self.epoch, first.incarnation))
        results = self._channels[-1].unary_stream(RESULTS, request_serializer=None, response_deserializer=None)(
            b"", metadata=epoch_metadata(self.epoch, last.incarnation)
        )
        self._spawn(self._send(forward))
        self._spawn(self._receive(results, on_result))
        for index in range(len(self.stages)):
            self._spawn(self._watch(index))

    def send(self, step: pb.Step) -> None:
        """Queue a step. There are never more than `max_in_flight` queued: the scheduler sees to that."""
        self._outbox.put_nowait(StepFrame(self.epoch, step.step_id, step.SerializeToString()))

    async def close(self) -> None:
        """Give the stages back where they still answer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        releases = (
            stub.Release(pb.ReleaseRequest(epoch=self.epoch, incarnation=stage.incarnation), timeout=1)
            for stub, stage in zip(self._stubs, self.stages, strict=True)
        )
        await asyncio.gather(*(_quietly(release) for release in releases))
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    def _check(self, described: list[pb.DescribeResponse]) -> None:
        for record, answer in zip(self.stages, described, strict=True):
            same = (answer.dtype, answer.block_size_tokens, answer.batch_invariant, answer.fingerprint)
            first = described[0]
            expected = (first.dtype, first.block_size_tokens, first.batch_invariant, record.fingerprint)
            if same != expected or answer.incarnation != record.incarnation:
                raise UnavailableError(
                    "STAGES_DIFFER", f"the stage at {record.address} does not fit the others: dtype, block size, "
                    "batch-invariance and fingerprint must be equal", address=record.address,
                )  # fmt: skip

    async def _claim(self) -> None:
        """All stages grant the same epoch: the highest any of them issued, asked again of the lower ones."""
        granted = [0] * len(self.stages)
        while len(set(granted)) > 1 or not granted[0]:
            wanted = max(granted)
            for index, stage in enumerate(self.stages):
                if granted[index] < wanted or not wanted:
                    request = pb.ClaimRequest(
                        owner_id=self._owner_id,
                        incarnation=stage.incarnation,
                        min_epoch=wanted,
                        lease_s=self._lease_s,
                    )
                    granted[index] = (await self._stubs[index].Claim(request, timeout=RPC_TIMEOUT_S)).epoch
        self.epoch = granted[0]

    async def _connect(self) -> None:
        following: pb.NextStage | None = None
        for stage, stub in reversed(list(zip(self.stages, self._stubs, strict=True))):
            request = pb.ConnectRequest(epoch=self.epoch, num_blocks=self.num_blocks, next=following)
            await stub.Connect(request, timeout=RPC_TIMEOUT_S)
            following = pb.NextStage(address=stage.address, epoch=self.epoch, incarnation=stage.incarnation)

    async def _send(self, call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> None:
        while True:
            for message in encode(await self._outbox.get()):
                await call.write(message)

    async def _receive(
        self, call: grpc.aio.UnaryStreamCall[bytes, bytes], on_result: Callable[[pb.StepResult], None]
    ) -> None:
        async for message in call:
            on_result(pb.StepResult.FromString(message))
        raise UnavailableError("RESULTS_ENDED", "the last stage ended its results")

    async def _renew(self) -> None:
        while True:
            for stage, stub in zip(self.stages, self._stubs, strict=True):
                request = pb.RenewRequest(epoch=self.epoch, incarnation=stage.incarnation)
                await stub.Renew(request, timeout=self._lease_s)
            await asyncio.sleep(self._lease_s / 4)

    async def _watch(self, index: int) -> None:
        stage = self.stages[index]
        request = pb.WatchRequest(epoch=self.epoch, incarnation=stage.incarnation)
        async for event in self._stubs[index].Watch(request):
            if event.HasField("link_broken"):
                raise UnavailableError("LINK_BROKEN", f"{stage.address} lost {event.link_broken.address}")
            if event.HasField("draining"):
                raise UnavailableError("STAGE_DRAINING", f"the stage at {stage.address} is about to stop")
        raise UnavailableError("WATCH_ENDED", f"the stage at {stage.address} ended its watch")

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        task.add_done_callback(self._on_done)
        self._tasks.append(task)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        """A task of a pipeline ends only by failing; the first one says why."""
        if task.cancelled() or self.broken.is_set():
            return
        error = task.exception()
        if isinstance(error, grpc.RpcError):
            error = from_rpc_error(error)
        if not isinstance(error, StagelineError):
            error = UnavailableError("PIPELINE_BROKEN", f"{type(error).__name__}: {error}")
        self.cause = error
        self.broken.set()


async def _quietly(call: Awaitable[object]) -> None:
    # The stage may be gone, or have fenced us already: then nothing is left to give back.
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call
