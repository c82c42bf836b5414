"""One stage server on a real socket, its client, and runners that record, wait and fail on command."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import torch
from engine_helpers import BLOCK_TOKENS, NUM_LAYERS, VOCAB_SIZE, ToyRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stageline.errors import InvalidArgumentError, ResourceExhaustedError
from stageline.grpc_errors import from_rpc_error
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.executor import StageExecutor
from stages.partition import LayerRange
from stages.server.frames import StepFrame, encode
from stages.server.link import FORWARD, OPTIONS, RESULTS, epoch_metadata
from stages.server.loader import LoadedStage
from stages.server.server import StageServer
from stages.spec import DEFAULT_SHARED_MEMORY_BYTES

FIRST, MIDDLE, LAST, WHOLE = (0, 1), (1, 2), (2, NUM_LAYERS), (0, NUM_LAYERS)
TIMEOUT_S = 10.0


def int32(*values: int) -> bytes:
    """int32, little endian."""
    return np.array(values, dtype="<i4").tobytes()


def step(step_id: int, num_tokens: int = 1, *, token: int = 5, sequence_id: int = 1, answer: bool = True) -> pb.Step:
    """One sequence from position 0, in the first blocks of the cache."""
    row = pb.Row(
        sequence_id=sequence_id, num_tokens=num_tokens, context_len=num_tokens,
        block_table=int32(*range(-(-num_tokens // BLOCK_TOKENS))),
    )  # fmt: skip
    if answer:
        row.sampling.top_p = 1.0
        row.sampling.repetition_penalty = 1.0
    return pb.Step(step_id=step_id, token_ids=int32(*[token] * num_tokens), rows=[row])


class RecordingRunner(ToyRunner):
    """A ToyRunner that lists the steps it ran, waits while `gate` is cleared and raises `faults[step_id]`."""

    def __init__(self, layers: LayerRange, **options: Any) -> None:
        super().__init__(layers, **options)
        self.executed: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()  # a step has reached the runner since the last clear()
        self.faults: dict[int, BaseException] = {}

    def execute(self, batch: Any, hidden_TD: torch.Tensor | None, on_scored: Any = None) -> torch.Tensor:
        self.started.set()
        assert self.gate.wait(60), "a test left the gate closed"
        self.executed.append(batch.step_id)
        if (fault := self.faults.get(batch.step_id)) is not None:
            raise fault
        return super().execute(batch, hidden_TD, on_scored)


class WideRunner(RecordingRunner):
    """Hidden states as wide as a real model's: the first stage makes them from the step's number, others check them."""

    WIDTH = 4096

    def __init__(self, layers: LayerRange, **options: Any) -> None:
        super().__init__(layers, **options)
        self.config.hidden_size = self.WIDTH
        self.damaged: list[int] = []

    @classmethod
    def hidden(cls, step_id: int, num_tokens: int) -> torch.Tensor:
        """float32 [num_tokens, WIDTH], other values for every step."""
        return torch.randn(num_tokens, cls.WIDTH, generator=torch.Generator().manual_seed(step_id))

    def execute(self, batch: Any, hidden_TD: torch.Tensor | None, on_scored: Any = None) -> torch.Tensor:
        assert self.gate.wait(60), "a test left the gate closed"
        expected_TD = self.hidden(batch.step_id, len(batch.token_ids))
        self.executed.append(batch.step_id)
        if hidden_TD is not None and not torch.equal(hidden_TD, expected_TD):
            self.damaged.append(batch.step_id)
        return torch.zeros(len(batch.output_rows), VOCAB_SIZE) if self.model.is_last else expected_TD


class ToyLoader:
    """Loads a runner of `kind` in two steps of ten bytes; waits before the second while `gate` is cleared, and raises `fault`
    then."""

    def __init__(
        self, kind: Callable[..., Any] = RecordingRunner, *, capacity: int = 64, max_layers: int = NUM_LAYERS
    ) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: BaseException | None = None
        self.loads: list[str] = []
        self.runner: Any = None
        self._kind, self._capacity, self._max_layers = kind, capacity, max_layers

    def description(self) -> pb.DescribeResponse:
        """As of a toy."""
        return pb.DescribeResponse(
            num_layers=NUM_LAYERS, hidden_size=1, vocab_size=VOCAB_SIZE, dtype=pb.ELEMENT_TYPE_FLOAT32,
            hidden_dtype=pb.ELEMENT_TYPE_FLOAT32, block_size_tokens=BLOCK_TOKENS, memory_bytes=self._max_layers,
            model="toy",
        )  # fmt: skip

    def check(self, layers: LayerRange) -> None:
        """A layer takes a byte."""
        if not 0 <= layers.start_layer < layers.end_layer <= NUM_LAYERS:
            raise InvalidArgumentError("LAYERS_OUT_OF_RANGE", f"no layers {layers}", field="layers")
        if len(layers) > self._max_layers:
            raise ResourceExhaustedError("STAGE_TOO_LARGE", f"layers {layers} do not fit")

    async def load(self, layers: LayerRange, progress: Callable[[int, int], None]) -> LoadedStage:
        """See StageLoader."""
        self.loads.append(str(layers))
        progress(10, 20)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        progress(20, 20)
        self.runner = self._kind(layers)
        return LoadedStage(StageExecutor(self.runner), self._capacity)


class Client:
    """A stage server that runs, and the calls a gateway or a neighbour makes to it."""

    def __init__(self, server: StageServer, runner: Any, port: int) -> None:
        self.server, self.runner, self.address = server, runner, f"127.0.0.1:{port}"
        self.channel = grpc.aio.insecure_channel(self.address, options=OPTIONS)
        self.stub = pb_grpc.StageServiceStub(self.channel)
        self.incarnation = server.incarnation

    async def claim(
        self, owner: str = "o", *, lease_s: float = 30.0, min_epoch: int = 0, layers: tuple[int, int] = (0, 0)
    ) -> pb.ClaimResponse:
        """Claim as `owner`, whatever stage it holds or that of `layers`."""
        request = pb.ClaimRequest(
            owner_id=owner, incarnation=self.incarnation, lease_s=lease_s, min_epoch=min_epoch,
            start_layer=layers[0], end_layer=layers[1],
        )  # fmt: skip
        return await self.stub.Claim(request, timeout=TIMEOUT_S)

    async def bind(
        self, layers: tuple[int, int], owner: str = "o", *, epoch: int | None = None, lease_s: float = 30.0
    ) -> int:
        """Bind as `owner`, who has just seen the epoch (or saw `epoch`); returns the epoch that was granted."""
        if epoch is None:
            epoch = (await self.describe()).epoch
        request = pb.BindRequest(
            owner_id=owner, incarnation=self.incarnation, epoch=epoch, start_layer=layers[0], end_layer=layers[1],
            lease_s=lease_s,
        )  # fmt: skip
        return (await self.stub.Bind(request, timeout=TIMEOUT_S)).epoch

    async def until_state(self, state: str) -> None:
        """Wait until the stage says so of itself."""
        async with asyncio.timeout(TIMEOUT_S):
            while await self.state() != state:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def connect(
        self,
        epoch: int,
        following: Client | None = None,
        /,
        *,
        num_blocks: int = 64,
        timeout_s: float = TIMEOUT_S,
        **other: Any,
    ) -> None:
        """Wire to `following`, which has the same epoch; `other` replaces fields of NextStage."""
        request = pb.ConnectRequest(epoch=epoch, num_blocks=num_blocks)
        if following is not None:
            request.next.MergeFrom(
                pb.NextStage(address=following.address, epoch=epoch, incarnation=following.incarnation)
            )
        if other:
            request.next.MergeFrom(pb.NextStage(**other))
        await self.stub.Connect(request, timeout=timeout_s)

    async def start(self, owner: str = "o", *, num_blocks: int = 64, **options: Any) -> int:
        """Claim and wire a last stage; returns the epoch."""
        epoch = (await self.claim(owner, **options)).epoch
        await self.connect(epoch, num_blocks=num_blocks)
        return epoch

    async def renew(self, epoch: int) -> pb.RenewResponse:
        """Extend the lease."""
        return await self.stub.Renew(pb.RenewRequest(epoch=epoch, incarnation=self.incarnation), timeout=TIMEOUT_S)

    async def release(self, epoch: int) -> None:
        """End the claim."""
        await self.stub.Release(pb.ReleaseRequest(epoch=epoch, incarnation=self.incarnation), timeout=TIMEOUT_S)

    async def describe(self) -> pb.DescribeResponse:
        """What the stage says of itself."""
        return await self.stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)

    async def state(self) -> str:
        """`UNBOUND`, `LOADING`, `SPARE`, `CLAIMED`, `CONNECTED` or `DRAINING`."""
        return pb.StageState.Name((await self.describe()).state).removeprefix("STAGE_STATE_")

    async def health(self, service: str = "stageline.stage.v1.StageService") -> str:
        """`SERVING` or `NOT_SERVING`."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def watch(self, epoch: int) -> Any:
        """A subscription that is active. Raises AioRpcError where it is refused."""
        call = self.stub.Watch(pb.WatchRequest(epoch=epoch, incarnation=self.incarnation))
        first = await asyncio.wait_for(call.read(), TIMEOUT_S)
        assert first is not grpc.aio.EOF, "ended before the first event"
        assert first.HasField("watching")
        return call

    def forward(self, epoch: int, incarnation: str | None = None) -> Any:
        """An open Forward stream."""
        metadata = epoch_metadata(epoch, self.incarnation if incarnation is None else incarnation)
        return self.channel.stream_unary(FORWARD)(metadata=metadata)

    def results(self, epoch: int, incarnation: str | None = None) -> Any:
        """An open Results stream."""
        metadata = epoch_metadata(epoch, self.incarnation if incarnation is None else incarnation)
        return self.channel.unary_stream(RESULTS)(b"", metadata=metadata)

    async def send_one(self, call: Any, epoch: int, step_id: int) -> None:
        """A step of one token, with the hidden states that this stage expects."""
        first, width = self.runner.model.is_first, self.runner.config.hidden_size
        element_type = pb.ELEMENT_TYPE_UNSPECIFIED if first else pb.ELEMENT_TYPE_FLOAT32
        await send(call, epoch, step(step_id), b"" if first else bytes(4 * width), element_type)

    async def good_step(self, step_id: int = 1, owner: str = "o") -> None:
        """The stage (a last one) can be claimed, wired, and computes."""
        epoch = await self.start(owner)
        forward, results = self.forward(epoch), self.results(epoch)
        await self.send_one(forward, epoch, step_id)
        answer = await result(results)
        assert (answer.step_id, len(answer.rows), answer.HasField("error")) == (step_id, 1, False)
        forward.cancel()
        results.cancel()


@asynccontextmanager
async def running(
    layers: tuple[int, int] = WHOLE,
    kind: Callable[..., Any] = RecordingRunner,
    *,
    depth: int = 8,
    capacity: int = 64,
    shared_memory_bytes: int = DEFAULT_SHARED_MEMORY_BYTES,
    **options: Any,
) -> AsyncIterator[Client]:
    """A stage that serves `layers` with a runner of `kind`."""
    runner = kind(LayerRange(*layers), **options)
    server = StageServer(
        StageExecutor(runner), fingerprint="toy", kv_capacity_blocks=capacity, queue_depth_steps=depth,
        shared_memory_bytes=shared_memory_bytes,
    )  # fmt: skip
    client = Client(server, runner, await server.start("127.0.0.1", 0))
    try:
        yield client
    finally:
        runner.gate.set()
        await client.channel.close()
        await server.stop()


@asynccontextmanager
async def unbound(loader: ToyLoader | None = None) -> AsyncIterator[tuple[Client, ToyLoader]]:
    """A replica that holds no stage; the client's `runner` is None until `Client.runner` is set to the loader's."""
    loader = loader or ToyLoader()
    server = StageServer(None, fingerprint="toy", loader=loader)
    client = Client(server, None, await server.start("127.0.0.1", 0))
    try:
        yield client, loader
    finally:
        loader.gate.set()
        if loader.runner is not None:
            loader.runner.gate.set()
        await client.channel.close()
        await server.stop()


async def wire(*stages: Client, num_blocks: int = 64, owner: str = "o") -> int:
    """Claim stages under one epoch and connect them in a chain; returns the epoch."""
    epoch = max([(await stage.describe()).epoch for stage in stages]) + 1
    for stage in stages:
        assert (await stage.claim(owner, min_epoch=epoch)).epoch == epoch
    for stage, following in reversed(list(zip(stages, [*stages[1:], None], strict=True))):
        await stage.connect(epoch, following, num_blocks=num_blocks)
    return epoch


async def send(call: Any, epoch: int, what: pb.Step, payload: Any = b"", element_type: int = 0) -> None:
    """Write one step."""
    await write(call, StepFrame(epoch, what.step_id, what.SerializeToString(), b"", element_type, payload))


async def write(call: Any, frame: StepFrame) -> None:
    """Write one frame's messages."""
    for message in encode(frame):
        await call.write(message)


async def push(call: Any, epoch: int, steps: Sequence[pb.Step]) -> None:
    """Write steps until the stage ends the stream."""
    try:
        for what in steps:
            await send(call, epoch, what)
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        assert call.done()


async def send_hidden(call: Any, epoch: int, what: pb.Step, hidden_TD: torch.Tensor) -> None:
    """Write one step with float32 hidden states."""
    await send(call, epoch, what, memoryview(hidden_TD.contiguous().numpy()).cast("B"), pb.ELEMENT_TYPE_FLOAT32)


async def result(call: Any, timeout_s: float = TIMEOUT_S) -> pb.StepResult:
    """The next answer. Raises AioRpcError where the stream has ended with an error."""
    message = await asyncio.wait_for(call.read(), timeout_s)
    assert message is not grpc.aio.EOF, "the stream of answers ended"
    return pb.StepResult.FromString(message)


async def refusal(work: Awaitable[Any], timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """Code and reason of the error that a call ends with; fails where it succeeds or takes too long."""
    try:
        answer = await asyncio.wait_for(work, timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code().name, from_rpc_error(error).reason
    raise AssertionError(f"not refused: {answer!r:.200}")


async def ending(call: Any, timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """Code and reason that a stream of answers or events ends with; what still comes before is dropped."""

    async def read() -> Any:
        while (message := await call.read()) is not grpc.aio.EOF:
            pass
        return message

    return await refusal(read(), timeout_s)
