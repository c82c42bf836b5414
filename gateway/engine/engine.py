"""The engine: forms lanes over the replicas there are, spreads requests over them, keeps them going when stages die."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import TypeVar

from gateway.engine.choice import ChoiceState, Deltas
from gateway.engine.lane import Lane, replica_status
from gateway.pipelines.discovery import Registry, ReplicaRecord, describe, new_owner_id
from gateway.pipelines.form import Chain, chain
from gateway.pipelines.pipeline import Pipeline
from gateway.scheduler import Scheduler
from gateway.tokenizer import Tokenizer
from gateway.types import (
    ChoiceDelta,
    GenerateRequest,
    ModelInfo,
    PipelineStatus,
    ReplicaStatus,
    SamplingParams,
)
from stageline.errors import DeadlineExceededError, ResourceExhaustedError, StagelineError, UnavailableError

logger = logging.getLogger("stageline.gateway")

T = TypeVar("T")

RETRY_S = 0.25  # between attempts to open a pipeline
SUSPECT_S = 5.0  # how long a replica that did not answer is passed over while others can take its place


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Limits, from the configuration."""

    max_step_tokens: int = 2048
    max_step_sequences: int = 256
    max_waiting_sequences: int = 1024
    lease_s: float = 10.0
    canary_timeout_s: float = 120.0


class Engine:
    """All pipelines of one gateway. Lives on one event loop."""

    def __init__(
        self, *, model: ModelInfo, tokenizer: Tokenizer, registry: Registry, settings: EngineSettings, fingerprint: str
    ) -> None:
        self.model = model
        self._tokenizer, self._registry, self._settings, self._fingerprint = tokenizer, registry, settings, fingerprint
        self._owner_id = new_owner_id()
        self._lanes: list[Lane] = []
        self._suspects: dict[str, float] = {}  # incarnation → until when
        self._sequence_ids = itertools.count(1)
        self._changed = asyncio.Event()  # replaced at every change of membership or readiness
        self._num_unplaced = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Begin to form pipelines as replicas appear."""
        self._registry.on_change = self._on_membership
        self._on_membership()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, then end them with UNAVAILABLE."""
        self._stopping = True
        self._notify()
        end_s = time.monotonic() + drain_s
        while any(lane.load for lane in self._lanes) and time.monotonic() < end_s:  # noqa: ASYNC110 - at most drain_s
            await asyncio.sleep(0.05)
        for lane in self._lanes:
            lane.fail_all(UnavailableError("GATEWAY_STOPPING", "the gateway is stopping; retry elsewhere"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(lane.close() for lane in self._lanes))

    def ready(self) -> bool:
        """Whether a canary has passed every stage of some pipeline that still stands."""
        return not self._stopping and any(lane.state == "ready" for lane in self._lanes)

    async def wait_ready(self) -> None:
        """Return once `ready` holds."""
        while not self.ready():
            await self._changed.wait()

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """For `stageline status`."""
        return tuple(lane.status() for lane in self._lanes)

    def spares(self) -> tuple[ReplicaStatus, ...]:
        """Replicas in no pipeline."""
        return tuple(replica_status(record, "spare") for record in self._free(None))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices as they come. Closing the iterator cancels the request.

        Raises DeadlineExceededError, ResourceExhaustedError, UnavailableError, or InternalError for this request only.
        """
        deltas: Deltas = asyncio.Queue()
        lane = await self._place(request)
        choices = [
            ChoiceState(
                request,
                request.first_choice + i,
                next(self._sequence_ids),
                self._tokenizer,
                self.model.max_context_tokens,
                deltas,
            )
            for i in range(request.num_choices)
        ]
        open_choices = len(choices)
        try:
            for choice in choices:
                if not choice.ended:  # a resumed generation may have ended already
                    lane.add(choice)
            while open_choices:
                delta = await self._next(deltas, request.deadline_s)
                if isinstance(delta, StagelineError):
                    raise delta
                open_choices -= delta.finish_reason is not None
                yield delta
        finally:
            for choice in choices:
                lane.cancel(choice)

    async def _place(self, request: GenerateRequest) -> Lane:
        """The least loaded ready lane; waits, within the deadline, while there is none."""
        if self._num_unplaced >= self._settings.max_waiting_sequences:
            raise ResourceExhaustedError("QUEUE_FULL", f"{self._num_unplaced} requests already wait for a pipeline")
        self._num_unplaced += 1
        try:
            while True:
                if self._stopping:
                    raise UnavailableError("GATEWAY_STOPPING", "the gateway is stopping; retry elsewhere")
                usable = [lane for lane in self._lanes if lane.state in ("ready", "recovering")]
                if usable:
                    return min(usable, key=lambda lane: (lane.state != "ready", lane.load))
                await _within(self._changed.wait(), request.deadline_s)
        finally:
            self._num_unplaced -= 1

    async def _next(self, deltas: Deltas, deadline_s: float | None) -> ChoiceDelta | StagelineError:
        if not deltas.empty():
            return deltas.get_nowait()
        return await _within(deltas.get(), deadline_s)

    # Lanes.

    def _on_membership(self) -> None:
        """Open a lane for every complete chain of replicas that no lane uses; lanes that lost theirs come first."""
        self._notify()
        waiting = sum(not lane.stages for lane in self._lanes)
        chains, _ = chain(self._free(None), self._fingerprint)
        for _ in range(len(chains) - waiting):
            lane = Lane(str(len(self._lanes)), self._make_scheduler)
            self._lanes.append(lane)
            task = asyncio.ensure_future(self._keep(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _make_scheduler(self, pipeline: Pipeline) -> Scheduler:
        return Scheduler(
            num_blocks=pipeline.num_blocks,
            block_size_tokens=pipeline.block_size_tokens,
            max_step_tokens=self._settings.max_step_tokens,
            max_step_sequences=self._settings.max_step_sequences,
            max_in_flight=pipeline.max_in_flight,
            max_waiting_sequences=self._settings.max_waiting_sequences,
        )

    async def _keep(self, lane: Lane) -> None:
        """Keep a lane on a pipeline: open one, prove it with a canary, wait until it breaks, begin again."""
        while True:
            stages = self._pick(lane)
            if stages is None:
                await self._changed.wait()
                continue
            lane.stages = stages
            pipeline = Pipeline(stages, owner_id=self._owner_id, lease_s=self._settings.lease_s)
            try:
                await lane.open(pipeline)
                await self._canary(lane, pipeline)
                lane.state = "ready"
                self._notify()
                logger.info("pipeline %s is ready in epoch %d", lane.name, pipeline.epoch)
                await pipeline.broken.wait()
                assert pipeline.cause is not None
                raise pipeline.cause
            except StagelineError as error:
                logger.warning("pipeline %s: %s: %s", lane.name, error.reason, error.message)
            lane.state = "forming" if lane.scheduler is None else "recovering"
            lane.pipeline = pipeline
            await lane.close()
            await self._note_suspects(stages)
            lane.stages = ()
            self._notify()
            await asyncio.sleep(RETRY_S)

    async def _canary(self, lane: Lane, pipeline: Pipeline) -> None:
        """One greedy token through every stage, with whatever else the lane has to do."""
        request = GenerateRequest(
            request_id="canary", prompt_token_ids=(0,), sampling=SamplingParams(temperature=0, max_tokens=1)
        )
        deltas: Deltas = asyncio.Queue()
        choice = ChoiceState(
            request, 0, next(self._sequence_ids), self._tokenizer, self.model.max_context_tokens, deltas
        )
        lane.add(choice)
        answer = asyncio.ensure_future(deltas.get())
        broken = asyncio.ensure_future(pipeline.broken.wait())
        try:
            await asyncio.wait(
                {answer, broken}, return_when=asyncio.FIRST_COMPLETED, timeout=self._settings.canary_timeout_s
            )
            if pipeline.cause is not None:
                raise pipeline.cause
            if not answer.done():
                raise UnavailableError("CANARY_TIMEOUT", "no canary came back from the pipeline in time")
            if isinstance(delta := answer.result(), StagelineError):
                raise delta
        finally:
            answer.cancel()
            broken.cancel()
            lane.cancel(choice)

    def _pick(self, lane: Lane) -> Chain | None:
        """A chain of free replicas, without those that did not answer lately where that is possible."""
        now = time.monotonic()
        self._suspects = {name: until for name, until in self._suspects.items() if until > now}
        free = self._free(lane)
        trusted = [record for record in free if record.incarnation not in self._suspects]
        for candidates in (trusted, free):
            chains, _ = chain(candidates, self._fingerprint)
            if chains:
                return chains[0]
        return None

    def _free(self, lane: Lane | None) -> list[ReplicaRecord]:
        used = {stage.incarnation for other in self._lanes if other is not lane for stage in other.stages}
        return [record for record in self._registry.replicas() if record.incarnation not in used]

    async def _note_suspects(self, stages: Chain) -> None:
        """Ask each stage of a broken pipeline whether it is still there."""
        answers = await asyncio.gather(*(describe(s.address, timeout_s=1.0) for s in stages), return_exceptions=True)
        for stage, answer in zip(stages, answers, strict=True):
            if isinstance(answer, BaseException) or answer.incarnation != stage.incarnation:
                self._suspects[stage.incarnation] = time.monotonic() + SUSPECT_S

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _within(work: Awaitable[T], deadline_s: float | None) -> T:
    """Await until a deadline on the time.monotonic clock. Raises DeadlineExceededError."""
    timeout = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
    try:
        return await asyncio.wait_for(work, timeout)
    except TimeoutError:
        raise DeadlineExceededError("DEADLINE_EXCEEDED", "the request's deadline passed before it ended") from None
