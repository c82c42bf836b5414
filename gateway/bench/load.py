"""Streams against a running server, and when each of their tokens came. All times in seconds of a monotonic clock."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

NUM_CHANNELS = 4  # one connection alone would bound many streams by its own flow control
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of a request, in tokens."""

    prompt_tokens: int
    new_tokens: int


@dataclass(slots=True)
class Outcome:
    """One request: when it was sent and when its tokens came; `error` is a gRPC code and its details."""

    shape: Shape
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]


class Generator:
    """Sends greedy requests with random prompts, which no prefix cache knows beyond the prefix that is given."""

    def __init__(
        self,
        address: str,
        seed: int,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, int | str]] = (),
        metadata: tuple[tuple[str, str], ...] = (),
        constraint: gen.Constraint | None = None,
    ) -> None:
        """`credentials` and `options` are the channels' (plain text without), `metadata` and `constraint` every call's."""
        options = (*options, *OPTIONS)
        self._channels = [
            grpc.aio.insecure_channel(address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=options)
            for _ in range(NUM_CHANNELS)
        ]
        self._metadata, self._constraint = metadata, constraint
        self._stubs = [InferenceServiceStub(channel) for channel in self._channels]
        self._random = random.Random(seed)
        self._sent = 0
        self.model = pb.GetModelResponse()

    async def __aenter__(self) -> Generator:
        self.model = await self._stubs[0].GetModel(pb.GetModelRequest(), timeout=10, metadata=self._metadata)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    def tokens(self, count: int) -> list[int]:
        """Random token ids."""
        return [self._random.randrange(self.model.vocab_size) for _ in range(count)]

    async def run(self, shape: Shape, prefix: Sequence[int] = ()) -> Outcome:
        """One request to its end; its prompt begins with `prefix`."""
        outcome = Outcome(shape, time.perf_counter())
        await self.run_into(outcome, prefix)
        return outcome

    async def run_into(self, outcome: Outcome, prefix: Sequence[int] = ()) -> None:
        """The same, written down as it goes on."""
        shape = outcome.shape
        self._sent += 1
        stub = self._stubs[self._sent % NUM_CHANNELS]
        ids = [*prefix, *self.tokens(shape.prompt_tokens - len(prefix))]
        request = pb.StreamGenerateRequest(
            generation=gen.Generation(
                token_ids=gen.TokenIds(ids=ids),
                sampling=gen.SamplingParams(temperature=0),
                stop=gen.StopConditions(max_tokens=shape.new_tokens, ignore_eos=self._constraint is None),
                constraint=self._constraint,
            )
        )
        outcome.sent_s = time.perf_counter()
        try:
            async for response in stub.StreamGenerate(request, metadata=self._metadata):
                for delta in response.choices:
                    outcome.token_s += [time.perf_counter()] * len(delta.token_ids)
        except grpc.aio.AioRpcError as error:
            outcome.error = f"{error.code().name}: {error.details()}"

    async def closed_loop(self, shapes: Sequence[Shape], num_streams: int) -> list[Outcome]:
        """`num_streams` requests at a time until all of `shapes` are done."""
        waiting, outcomes = iter(shapes), list[Outcome]()

        async def stream() -> None:
            for shape in waiting:
                outcomes.append(await self.run(shape))

        await asyncio.gather(*(stream() for _ in range(num_streams)))
        return outcomes

    async def poisson(self, shapes: Sequence[Shape], requests_per_s: float) -> list[Outcome]:
        """Every request at its own moment, however many are under way."""
        tasks = []
        for shape in shapes:
            tasks.append(asyncio.create_task(self.run(shape)))
            await asyncio.sleep(self._random.expovariate(requests_per_s))
        return list(await asyncio.gather(*tasks))

    def conversation(self, count: int, longest_prompt: int, longest_answer: int) -> list[Shape]:
        """Lengths as in chats: log-normal, medians a quarter of the longest, cut there."""

        def length(longest: int) -> int:
            return max(1, min(longest, int(self._random.lognormvariate(0, 0.8) * longest / 4)))

        return [Shape(length(longest_prompt), length(longest_answer)) for _ in range(count)]
