"""One pipeline: claims its stages under one epoch, wires them, streams steps in and results out, notices when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
import grpc.aio

from gateway.pipelines.discovery import ReplicaRecord
from gateway.pipelines.form import Chain
from gateway.pipelines.protocol import StepWindow, next_claim
from stageline.errors import StagelineError, UnavailableError
from stageline.grpc_errors import from_rpc_error
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.server.access import OPEN, StageAccess
from stages.server.frames import StepFrame, encode
from stages.server.link import FORWARD, OPTIONS, RESULTS, epoch_metadata

DESCRIBE_TIMEOUT_S = 5.0
RPC_TIMEOUT_S = 30.0  # a claim waits for the running kernel, a connect for the KV cache
RELEASE_TIMEOUT_S = PROGRESS_TIMEOUT_S = 1.0

OnResult = Callable[[pb.StepResult], None]
OnDraining = Callable[[str, float], None]

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class Pipeline:
    """A chain of stages under one epoch. After `broken` is set it is of no use any more: close it and open another.

    What breaks it, always with the typed `cause`: a call or stream that ends, a link between stages that breaks, a lease
    that cannot be renewed (lost, or no answer within its length), steps that do not come back for `stall_timeout_s`.
    """

    def __init__(
        self, stages: Chain, *, owner_id: str, lease_s: float, stall_timeout_s: float = 60.0,
        access: StageAccess = OPEN,
    ) -> None:  # fmt: skip
        self.stages = stages
        self.epoch = 0
        self.num_blocks = self.block_size_tokens = self.max_in_flight = 0
        self.broken = asyncio.Event()
        self.cause: StagelineError | None = None
        self._owner_id, self._lease_s, self._stall_timeout_s = owner_id, lease_s, stall_timeout_s
        self._channels = [access.channel(stage.address, OPTIONS) for stage in stages]
        self._access = access
        self._stubs = [pb_grpc.StageServiceStub(channel) for channel in self._channels]
        self._granted = [0] * len(stages)  # epoch that each stage granted last
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox: asyncio.Queue[StepFrame] = asyncio.Queue()
        self._window = StepWindow()
        self._moved_s = 0.0  # when a step came back, or the first of several was sent; on the monotonic clock

    async def open(self, on_result: OnResult, on_draining: OnDraining) -> None:
        """Claim and wire every stage. Raises StagelineError where one refuses or does not answer.

        `on_result` gets every answer, in order; `on_draining` the incarnation of a stage that is about to stop,
        and how many seconds it still goes on.
        """
        try:
            described = await asyncio.gather(
                *(stub.Describe(pb.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S) for stub in self._stubs)
            )
            self._check(described)
            self.block_size_tokens = described[0].block_size_tokens
            self.num_blocks = min(stage.kv_capacity_blocks for stage in described)
            # In flight: one step a stage and one to hide the hops, never more than a queue holds.
            self.max_in_flight = min(len(self.stages) + 1, *(stage.queue_depth_steps for stage in described))
            await self._claim()
            self._spawn(self._renew())
            await self._watch_all(on_draining)
            await self._connect()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except TimeoutError:
            raise UnavailableError("WATCH_TIMEOUT", f"a stage did not answer within {RPC_TIMEOUT_S} s") from None
        first, last = self.stages[0], self.stages[-1]
        forward = self._channels[0].stream_unary(FORWARD, request_serializer=None, response_deserializer=None)(
            metadata=epoch_metadata(self.epoch, first.incarnation) + self._access.metadata()  # type: ignore[call-arg]
        )
        results = self._channels[-1].unary_stream(RESULTS, request_serializer=None, response_deserializer=None)(
            b"", metadata=epoch_metadata(self.epoch, last.incarnation) + self._access.metadata()
        )
        self._spawn(self._send(forward))
        self._spawn(self._receive(results, on_result))
        self._spawn(self._watchdog())

    def send(self, step: pb.Step) -> None:
        """Queue a step. There are never more than `max_in_flight` queued: the scheduler sees to that."""
        if self._window.oldest is None:
            self._moved_s = time.monotonic()
        self._window = self._window.send(step.step_id)
        self._outbox.put_nowait(StepFrame(self.epoch, step.step_id, step.SerializeToString()))

    async def progress(self, timeout_s: float) -> list[tuple[int, int] | None]:
        """Of each stage the step executed last and the one being executed, None where the stage died; for a pipeline that
        broke, before `close`. A stage that fenced us lives, and says nothing of our epoch: (0, 0)."""
        return list(await asyncio.gather(*(self._progress_of(index, timeout_s) for index in range(len(self.stages)))))

    async def _progress_of(self, index: int, timeout_s: float) -> tuple[int, int] | None:
        stage, stub = self.stages[index], self._stubs[index]
        try:
            described = await stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
            if described.incarnation != stage.incarnation:
                return None
            if described.epoch != self.epoch:  # computing failed, or another owner has it
                return None if described.state == pb.STAGE_STATE_DRAINING else (0, 0)
            request = pb.RenewRequest(epoch=self.epoch, incarnation=stage.incarnation)
            answer = await stub.Renew(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return (0, 0) if error.code() is grpc.StatusCode.FAILED_PRECONDITION else None
        return answer.last_executed_step, answer.running_step

    async def close(self) -> None:
        """Give the stages back where they still answer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._release(index) for index, epoch in enumerate(self._granted) if epoch))
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    def _check(self, described: Sequence[pb.DescribeResponse]) -> None:
        expected = _agreed(described[0])
        for record, answer in zip(self.stages, described, strict=True):
            if (answer.incarnation, answer.fingerprint) != (record.incarnation, record.fingerprint):
                raise UnavailableError(
                    "STAGE_REPLACED", f"another replica than the one that was announced answers at {record.address}",
                    address=record.address,
                )  # fmt: skip
            if (answer.start_layer, answer.end_layer) != (record.start_layer, record.end_layer):
                raise UnavailableError(
                    "STAGE_REBOUND", f"the stage at {record.address} holds layers {answer.start_layer}-{answer.end_layer} by now",
                    address=record.address,
                )  # fmt: skip
            if answer.busy_s > self._stall_timeout_s:  # a claim would wait for its kernel
                raise UnavailableError(
                    "STAGE_STALLED", f"the stage at {record.address} has been in one kernel for {answer.busy_s:.0f} s",
                    address=record.address,
                )  # fmt: skip
            if _agreed(answer) != expected:
                raise UnavailableError(
                    "STAGES_DIFFER", f"the stage at {record.address} does not fit the one at {self.stages[0].address}: "
                    "dtype, block size, batch-invariance, quantization and the hidden states' dtype must be equal; start them from one "
                    "configuration",
                    address=record.address,
                )  # fmt: skip

    async def _claim(self) -> None:
        """All stages grant the same epoch: the highest any of them issued, asked again of the lower ones."""
        while (claim := next_claim(self._granted)) is not None:
            place, min_epoch = claim
            request = pb.ClaimRequest(
                owner_id=self._owner_id,
                incarnation=self.stages[place].incarnation,
                min_epoch=min_epoch,
                lease_s=self._lease_s,
                start_layer=self.stages[place].start_layer,
                end_layer=self.stages[place].end_layer,
            )
            answer = await self._stubs[place].Claim(request, timeout=RPC_TIMEOUT_S)
            self._granted[place] = answer.epoch
        self.epoch = self._granted[0]

    async def _watch_all(self, on_draining: OnDraining) -> None:
        """Subscribe before anything is wired, so that no broken link goes unseen."""
        calls = [
            stub.Watch(
                pb.WatchRequest(epoch=self.epoch, incarnation=stage.incarnation), metadata=self._access.metadata()
            )
            for stage, stub in zip(self.stages, self._stubs, strict=True)
        ]
        for call, stage in zip(calls, self.stages, strict=True):
            first = await asyncio.wait_for(call.read(), RPC_TIMEOUT_S)
            if not isinstance(first, pb.WatchResponse):
                raise UnavailableError(
                    "WATCH_ENDED", f"the stage at {stage.address} could not be watched", address=stage.address
                )
            self._spawn(self._watch(call, stage, on_draining))

    async def _connect(self) -> None:
        following: pb.NextStage | None = None
        for stage, stub in reversed(list(zip(self.stages, self._stubs, strict=True))):
            request = pb.ConnectRequest(epoch=self.epoch, num_blocks=self.num_blocks, next=following)
            await stub.Connect(request, timeout=RPC_TIMEOUT_S)
            following = pb.NextStage(address=stage.address, epoch=self.epoch, incarnation=stage.incarnation)

    async def _release(self, index: int) -> None:
        request = pb.ReleaseRequest(epoch=self._granted[index], incarnation=self.stages[index].incarnation)
        with contextlib.suppress(grpc.aio.AioRpcError):  # gone, or fenced us already: nothing is left to give back
            await self._stubs[index].Release(request, timeout=RELEASE_TIMEOUT_S)

    async def _send(self, call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> None:
        while True:
            for message in encode(await self._outbox.get()):
                try:
                    await call.write(message)
                except asyncio.InvalidStateError:  # the stream ended before the write
                    detail = f"{(await call.code()).name}: {await call.details()}"
                    raise UnavailableError("FORWARD_ENDED", f"the first stage ended the stream: {detail}") from None

    async def _receive(self, call: grpc.aio.UnaryStreamCall[bytes, bytes], on_result: OnResult) -> None:
        async for message in call:
            result = pb.StepResult.FromString(message)
            self._window = self._window.take(result.step_id)
            self._moved_s = time.monotonic()
            on_result(result)
        raise UnavailableError("RESULTS_ENDED", "the last stage ended its results")

    async def _watchdog(self) -> None:
        """A stage can hang in a kernel and still answer calls: what counts is that steps come back."""
        while self._window.oldest is None or time.monotonic() < self._moved_s + self._stall_timeout_s:  # noqa: ASYNC110
            await asyncio.sleep(self._stall_timeout_s / 8)
        oldest = self._window.oldest
        progress = await self.progress(PROGRESS_TIMEOUT_S)
        # The step hangs in the first stage that has not executed it.
        place = next((i for i, stage in enumerate(progress) if stage is None or stage[0] < oldest), len(progress) - 1)
        stage = self.stages[place]
        raise UnavailableError(
            "STAGE_STALLED",
            f"no step came back for {self._stall_timeout_s:g} s: the stage at {stage.address} does not get past step {oldest}",
            address=stage.address, incarnation=stage.incarnation, step_id=oldest,
        )  # fmt: skip

    async def _renew(self) -> None:
        while True:
            renewals = (
                stub.Renew(pb.RenewRequest(epoch=self.epoch, incarnation=stage.incarnation), timeout=self._lease_s)
                for stage, stub in zip(self.stages, self._stubs, strict=True)
            )
            await asyncio.gather(*renewals)
            await asyncio.sleep(self._lease_s / 4)

    async def _watch(
        self,
        call: grpc.aio.UnaryStreamCall[pb.WatchRequest, pb.WatchResponse],
        stage: ReplicaRecord,
        on_draining: OnDraining,
    ) -> None:
        while isinstance(event := await call.read(), pb.WatchResponse):  # else the end of the stream
            if event.HasField("link_broken"):
                link = event.link_broken
                raise UnavailableError(
                    "LINK_BROKEN",
                    f"the stage at {stage.address} lost {link.address}: {link.detail}",
                    address=link.address,
                )
            if event.HasField("draining"):
                on_draining(stage.incarnation, event.draining.remaining_s)
        raise UnavailableError("WATCH_ENDED", f"the stage at {stage.address} ended its watch", address=stage.address)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_done)
        self._tasks.append(task)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        """A task of a pipeline ends only by failing; the first one says why."""
        if task.cancelled() or (error := task.exception()) is None or self.broken.is_set():
            return
        if isinstance(error, grpc.RpcError):
            error = from_rpc_error(error)
        if not isinstance(error, StagelineError):
            error = UnavailableError("PIPELINE_BROKEN", f"{type(error).__name__}: {error}")
        self.cause = error
        self.broken.set()


def _agreed(stage: pb.DescribeResponse) -> tuple[object, ...]:
    """What must be the same on all stages of a pipeline."""
    return stage.dtype, stage.block_size_tokens, stage.batch_invariant, stage.quantization, stage.hidden_dtype
