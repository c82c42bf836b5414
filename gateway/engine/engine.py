"""The engine: spreads requests over the lanes there are and carries their deltas to whoever asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from gateway.autoscale.policy import Demand
from gateway.engine.choice import ChoiceState, Deltas
from gateway.engine.keeper import Keeper
from gateway.engine.lane import Lane, deadline_exceeded
from gateway.engine.settings import EngineSettings
from gateway.pipelines.discovery import Registry
from gateway.tokenizer import Tokenizer
from gateway.types import ChoiceDelta, GenerateRequest, ModelInfo, PipelineStatus, ReplicaStatus
from stageline.errors import ResourceExhaustedError, StagelineError, UnavailableError
from stageline.operations.v1.operations_service_pb2 import StreamStepsResponse

DRAIN_POLL_S = 0.05


class Engine:
    """All pipelines of one gateway. Lives on one event loop."""

    def __init__(
        self, *, model: ModelInfo, tokenizer: Tokenizer, registry: Registry, settings: EngineSettings, fingerprint: str
    ) -> None:
        self.model = model
        self._tokenizer, self._settings = tokenizer, settings
        self._keeper = Keeper(registry, settings, fingerprint, self._make_choice)
        self._sequence_ids = itertools.count(1)
        self._num_unplaced = self._unplaced_tokens = 0
        self._stopping = False
        self.batch_backlog_tokens: Callable[[], int] = lambda: 0
        """Tokens of batch work that was not handed to `generate` yet. Whoever keeps batches replaces it."""

    async def start(self) -> None:
        """Begin to form pipelines as replicas appear."""
        self._keeper.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, then end them with UNAVAILABLE."""
        self._stopping = True
        self._keeper.notify()
        end_s = time.monotonic() + drain_s
        while any(lane.load for lane in self._keeper.lanes) and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        for lane in self._keeper.lanes:
            lane.fail_all(_stopping())
        await self._keeper.stop()

    def ready(self) -> bool:
        """Whether a canary has passed every stage of some pipeline that still stands."""
        return not self._stopping and any(lane.state == "ready" for lane in self._keeper.lanes)

    async def wait_ready(self) -> None:
        """Return once `ready` holds."""
        while not self.ready():
            await self._keeper.changed.wait()

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """For `stageline status`."""
        return tuple(lane.status() for lane in self._keeper.lanes)

    def spares(self) -> tuple[ReplicaStatus, ...]:
        """Replicas in no pipeline."""
        return self._keeper.spares()

    def demand(self) -> Demand:
        """What all pipelines have to do, and what waits for one to appear."""
        now_s = time.monotonic()
        schedulers = [lane.scheduler for lane in self._keeper.lanes if lane.scheduler is not None]
        return Demand(
            pipelines=sum(lane.state == "ready" for lane in self._keeper.lanes),
            sequences=self._num_unplaced + sum(lane.load for lane in self._keeper.lanes),
            queued_tokens=self._unplaced_tokens + sum(one.backlog_tokens for one in schedulers),
            kv_pipelines=sum(one.kv_used_fraction for one in schedulers),
            late_sequences=sum(one.num_late(now_s) for one in schedulers),
            batch_backlog_tokens=self.batch_backlog_tokens(),
        )

    def watch_steps(self) -> AsyncGenerator[StreamStepsResponse, None]:
        """Every step of every pipeline that comes back from now on, in groups."""
        return self._keeper.feed.watch()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices as they come. Closing the iterator cancels the request.

        Raises for this request only: DeadlineExceededError, ResourceExhaustedError (queue full), UnavailableError
        (stopping), InvalidArgumentError (could never be held), InternalError (a stage could not execute its step).
        """
        deltas: Deltas = asyncio.Queue()
        choices = [self._make_choice(request, request.first_choice + i, deltas) for i in range(request.num_choices)]
        lane = await self._place(request, choices[0])
        num_open = len(choices)
        loop = asyncio.get_running_loop()
        timer = None
        if request.deadline_s is not None:
            timer = loop.call_later(_remaining(request.deadline_s), self._end, choices, deadline_exceeded())
        try:
            for choice in choices:
                if not choice.ended:  # a resumed generation may have ended already
                    lane.add(choice)
            lane.pump()
            while num_open:
                delta = await deltas.get()
                if isinstance(delta, StagelineError):
                    raise delta
                num_open -= delta.finish_reason is not None
                yield delta
        finally:
            if timer is not None:
                timer.cancel()
            self._end(choices, None)

    def _make_choice(self, request: GenerateRequest, index: int, deltas: Deltas) -> ChoiceState:
        return ChoiceState(
            request, index, next(self._sequence_ids), self._tokenizer, self.model.max_context_tokens, deltas
        )

    def _end(self, choices: Sequence[ChoiceState], error: StagelineError | None) -> None:
        """Drop what is left of a request; a choice may have moved to another lane since it was added."""
        for choice in choices:
            if error is not None:
                choice.fail(error)
            for lane in self._keeper.lanes:
                lane.cancel(choice)

    async def _place(self, request: GenerateRequest, choice: ChoiceState) -> Lane:
        """The ready lane on which it has the least to wait for, cached prefix counted, else one that recovers; waits,
        within the deadline, while there is none."""
        limits = self._settings
        num_tokens = request.num_choices * len(request.prompt_token_ids)
        full = self._num_unplaced and self._unplaced_tokens + num_tokens > limits.max_waiting_tokens
        if full or self._num_unplaced >= limits.max_waiting_sequences:
            raise ResourceExhaustedError(
                "QUEUE_FULL",
                f"{self._num_unplaced} requests of {self._unplaced_tokens} tokens already wait for a pipeline, "
                f"of at most {limits.max_waiting_sequences} and {limits.max_waiting_tokens}; retry later",
                retry_after_s=5.0,  # there is no pipeline: one takes seconds to come up
                waiting=self._num_unplaced,
                waiting_tokens=self._unplaced_tokens,
            )
        self._num_unplaced += 1
        self._unplaced_tokens += num_tokens
        try:
            while True:
                if self._stopping:
                    raise _stopping()
                if request.deadline_s is not None and request.deadline_s <= time.monotonic():
                    raise deadline_exceeded()
                usable = [lane for lane in self._keeper.lanes if lane.state in ("ready", "recovering")]
                if usable:
                    if len(usable) == 1:
                        return usable[0]
                    return min(usable, key=lambda lane: (lane.state != "ready", lane.cost_tokens(choice.sequence)))
                changed = self._keeper.changed.wait()
                try:
                    await asyncio.wait_for(
                        changed, None if request.deadline_s is None else _remaining(request.deadline_s)
                    )
                except TimeoutError:
                    raise deadline_exceeded() from None
        finally:
            self._num_unplaced -= 1
            self._unplaced_tokens -= num_tokens


def _remaining(deadline_s: float) -> float:
    return max(0.0, deadline_s - time.monotonic())


def _stopping() -> UnavailableError:
    return UnavailableError("GATEWAY_STOPPING", "the gateway is stopping; retry elsewhere")
