"""The engine: spreads requests over the lanes there are and carries their deltas to whoever asked."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from gateway.autoscale.policy import Demand
from gateway.engine.choice import ChoiceState
from gateway.engine.deltas import Deltas, Unread
from gateway.engine.invariants import EngineState, find_leaks
from gateway.engine.keeper import Keeper
from gateway.engine.lane import Lane, deadline_exceeded
from gateway.engine.ownership import pipelines_taken
from gateway.engine.settings import EngineSettings
from gateway.engine.status import pipeline_status
from gateway.engine.superseded import ModelWatch
from gateway.engine.track import Scores, Track, num_tracks
from gateway.metrics import Metrics
from gateway.pipelines.discovery import Registry
from gateway.scheduler import Sequence as ScheduledSequence
from gateway.tokenizer import Tokenizer
from gateway.types import (
    ChoiceDelta,
    ContinuationScore,
    GenerateRequest,
    ModelInfo,
    PipelineStatus,
    ReplicaStatus,
    ScoreRequest,
)
from stageline.errors import InvalidArgumentError, ResourceExhaustedError, StagelineError, UnavailableError
from stageline.operations.v1.operations_service_pb2 import StreamStepsResponse

logger = logging.getLogger("stageline.gateway")

DRAIN_POLL_S = 0.05
IDLE_CHECK_PERIOD_S = 0.5


@dataclass(slots=True)
class _Request:
    queued: bool = False  # every sequence of it has its place in a queue
    parts: Sequence[ChoiceState | Track] = ()
    timer: asyncio.TimerHandle | None = None  # ends them at the deadline


class Engine:
    """All pipelines of one gateway. Lives on one event loop."""

    def __init__(
        self, *, model: ModelInfo, tokenizer: Tokenizer, registry: Registry, settings: EngineSettings, fingerprint: str
    ) -> None:
        self.model = model
        self._tokenizer, self._settings = tokenizer, settings
        self.metrics = Metrics(model.name, self.pipelines)
        self._keeper = Keeper(registry, settings, fingerprint, self._make_choice, self.metrics)
        self._sequence_ids = itertools.count(1)
        self._num_unplaced = self._unplaced_tokens = 0
        self._stopping = False
        self._num_open = 0
        self._unread = Unread(settings.max_unread_tokens, settings.max_unread_tokens_total)
        self.metrics.gauge("num_open_requests", "Requests in the engine.", lambda: self._num_open)
        self.metrics.gauge("num_unplaced_requests", "Of those, no pipeline has them.", lambda: self._num_unplaced)
        self.metrics.gauge("unread_tokens", "What clients have not read.", lambda: self._unread.total)
        self._model_watch = ModelWatch(
            registry,
            fingerprint=fingerprint,
            after_s=settings.superseded_after_s,
            in_use=lambda: any(lane.stages for lane in self._keeper.lanes),
        )
        self._unchecked = False  # requests came since the engine was last checked
        self._tasks: list[asyncio.Task[None]] = []
        self._leaks_seen: set[str] = set()
        self.batch_backlog_tokens: Callable[[], int] = lambda: 0
        """Tokens of batch work that was not handed to `generate` yet. Whoever keeps batches replaces it."""

    async def start(self) -> None:
        """Begin to form pipelines as replicas appear."""
        self._keeper.start()
        self._tasks = [asyncio.create_task(one) for one in (self._check_when_idle(), self._watch_model())]

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, then end them with UNAVAILABLE."""
        self._stopping = True
        self._keeper.notify()
        end_s = time.monotonic() + drain_s
        while any(lane.load for lane in self._keeper.lanes) and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        for lane in self._keeper.lanes:
            lane.fail_all(_stopping())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keeper.stop()

    def ready(self) -> bool:
        """Whether a canary has passed every stage of some pipeline, and what it was sent since comes back."""
        return not self._stopping and any(lane.moving for lane in self._keeper.lanes)

    async def wait_ready(self) -> None:
        """Return once `ready` holds."""
        while not self.ready():
            await self._keeper.changed.wait()

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """For `stageline status`."""
        return tuple(pipeline_status(lane) for lane in self._keeper.lanes)

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
        with closing(Deltas(self._unread)) as deltas, self._counted() as counted:
            choices = [self._make_choice(request, request.first_choice + i, deltas) for i in range(request.num_choices)]
            if late := [mask for choice in choices if (mask := choice.late_mask) is not None]:
                await asyncio.wait(late, timeout=None if request.deadline_s is None else _remaining(request.deadline_s))
            num_tokens = request.num_choices * len(request.prompt_token_ids)
            lane = await self._place(choices[0].sequence, num_tokens, request.deadline_s)
            # A resumed generation may have ended already.
            self._queue(lane, counted, request, [choice for choice in choices if not choice.ended])
            num_open = len(choices)
            while num_open:
                delta = await deltas.get()
                if isinstance(delta, StagelineError):
                    raise delta
                num_open -= delta.finish_reason is not None
                yield delta

    @contextmanager
    def _counted(self) -> Iterator[_Request]:
        """Around all that a request does: counts it and how it ends, and ends what is left of it. Whatever is here outside of it
        is a leak."""
        self._num_open += 1
        self._unchecked = True
        request = _Request()
        try:
            yield request
        except StagelineError as error:
            refused = isinstance(error, ResourceExhaustedError | InvalidArgumentError) and not request.queued
            (self.metrics.rejected if refused else self.metrics.failed)(error.reason)
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self.metrics.cancelled()
            raise
        finally:
            if request.timer is not None:
                request.timer.cancel()
            self._end(request.parts, None)
            self._keeper.feed.forget(part.sequence.sequence_id for part in request.parts)
            self._num_open -= 1

    def _queue(
        self,
        lane: Lane,
        counted: _Request,
        request: GenerateRequest | ScoreRequest,
        parts: Sequence[ChoiceState | Track],
    ) -> None:
        """Give the parts of a request to a lane until its deadline. Raises what `Lane.add` raises."""
        counted.parts = parts
        if request.deadline_s is not None:
            loop = asyncio.get_running_loop()
            counted.timer = loop.call_later(_remaining(request.deadline_s), self._end, parts, deadline_exceeded())
        self._keeper.feed.follow(request.work, (part.sequence.sequence_id for part in parts))
        for part in parts:
            lane.add(part)
        counted.queued = True
        lane.pump()

    def leaks(self) -> tuple[str, ...]:
        """What is left of requests that ended, in sentences; a bug where there is any. () while requests are served."""
        return find_leaks(
            EngineState(
                num_open=self._num_open,
                num_unplaced=self._num_unplaced,
                unplaced_tokens=self._unplaced_tokens,
                num_pipelines=len(self._keeper.open_pipelines),
                num_chains=sum(bool(lane.stages) for lane in self._keeper.lanes),
                lanes=tuple(lane.holdings() for lane in self._keeper.lanes),
            )
        )

    async def _check_when_idle(self) -> None:
        """Look for leaks once after each time of work. What is found is counted every time and logged once."""
        while True:
            await asyncio.sleep(IDLE_CHECK_PERIOD_S)
            if not self._unchecked or self._num_open:
                continue
            leaks = self.leaks()
            if not leaks and any(lane.busy for lane in self._keeper.lanes):
                continue  # what was cancelled is on its way back: look again
            self._unchecked = False
            self.metrics.checked(len(leaks))
            for leak in leaks:
                if leak not in self._leaks_seen:
                    self._leaks_seen.add(leak)
                    logger.critical("INVARIANT VIOLATED, please report: nothing runs, but there is left: %s", leak)

    async def _watch_model(self) -> None:
        """End all requests once the model is superseded; `_place` and `check_room` refuse those that come then."""
        while True:
            changed = asyncio.create_task(self._keeper.changed.wait())
            if self._model_watch.look():
                if self._model_watch.superseded:
                    logger.error("%s", self._model_watch.error().message)
                    for lane in self._keeper.lanes:
                        lane.fail_all(self._model_watch.error())
                else:
                    logger.info("stages of this gateway's model are there again")
                self._keeper.notify()
            await asyncio.wait({changed}, timeout=self._model_watch.look_again_s)
            changed.cancel()

    async def score(self, request: ScoreRequest) -> AsyncGenerator[ContinuationScore, None]:
        """Scores of all continuations, as each is done. Closing the iterator cancels the request.

        Raises what `generate` raises.
        """
        scores: Scores = asyncio.Queue()
        longest_first = sorted(range(len(request.continuations)), key=lambda at: -len(request.continuations[at]))
        lengths = [len(request.continuations[at]) for at in longest_first]
        with self._counted() as counted:
            whole = Track(request, longest_first, next(self._sequence_ids), scores)
            num_tokens = len(request.context_token_ids) + sum(lengths)
            lane = await self._place(whole.sequence, num_tokens, request.deadline_s)
            assert lane.scheduler is not None
            number = num_tracks(
                num_context=len(request.context_token_ids),
                lengths=lengths,
                block_size_tokens=lane.scheduler.block_size_tokens,
                shares_prefix=request.use_prefix_cache and lane.scheduler.limits.prefix_caching,
                most_tokens=self._settings.max_waiting_tokens // 4,
            )
            places = (longest_first[i::number] for i in range(number))
            tracks = [Track(request, of, next(self._sequence_ids), scores) for of in places]
            self._queue(lane, counted, request, tracks)
            for _ in lengths:
                score = await scores.get()
                if isinstance(score, StagelineError):
                    raise score
                yield score

    def _make_choice(self, request: GenerateRequest, index: int, deltas: Deltas) -> ChoiceState:
        return ChoiceState(
            request, index, next(self._sequence_ids), self._tokenizer, self.model.max_context_tokens, deltas
        )

    def _end(self, choices: Sequence[ChoiceState | Track], error: StagelineError | None) -> None:
        """Drop what is left of a request; a choice may have moved to another lane since it was added."""
        for choice in choices:
            if error is not None:
                choice.fail(error)
            for lane in self._keeper.lanes:
                lane.cancel(choice)

    def check_room(self) -> None:
        """Raises ResourceExhaustedError or UnavailableError where even a request of one token would not be queued now."""
        try:
            self._check_served()
            usable = self._usable()
            if not usable:
                self._check_unplaced(1)
            elif all(lane.full for lane in usable):
                min(usable, key=lambda lane: lane.load).check_room()
        except StagelineError as error:
            self.metrics.rejected(error.reason)
            raise

    def _check_served(self) -> None:
        """Raises UnavailableError where no pipeline of this gateway takes requests any more."""
        if self._stopping:
            raise _stopping()
        if self._model_watch.superseded:
            raise self._model_watch.error()
        if self._keeper.all_taken():
            raise pipelines_taken()

    def _usable(self) -> list[Lane]:
        return [lane for lane in self._keeper.lanes if lane.state in ("ready", "recovering")]

    def _check_unplaced(self, num_tokens: int) -> None:
        limits = self._settings
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

    async def _place(self, sequence: ScheduledSequence, num_tokens: int, deadline_s: float | None) -> Lane:
        """The lane that moves and on which a request of so many tokens, of which this is the first sequence, has the least to
        wait for, cached prefix counted, else one that recovers; waits, within the deadline, while there is none."""
        self._check_unplaced(num_tokens)
        self._num_unplaced += 1
        self._unplaced_tokens += num_tokens
        try:
            while True:
                self._check_served()
                if deadline_s is not None and deadline_s <= time.monotonic():
                    raise deadline_exceeded()
                if usable := self._usable():
                    if len(usable) == 1:
                        return usable[0]
                    return min(usable, key=lambda lane: (not lane.moving, lane.draining, lane.cost_tokens(sequence)))
                changed = self._keeper.changed.wait()
                try:
                    await asyncio.wait_for(changed, None if deadline_s is None else _remaining(deadline_s))
                except TimeoutError:
                    raise deadline_exceeded() from None
        finally:
            self._num_unplaced -= 1
            self._unplaced_tokens -= num_tokens


def _remaining(deadline_s: float) -> float:
    return max(0.0, deadline_s - time.monotonic())


def _stopping() -> UnavailableError:
    return UnavailableError("GATEWAY_STOPPING", "the gateway is stopping; retry elsewhere")
