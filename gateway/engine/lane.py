"""A lane: one scheduler and the pipeline that runs its micro-batches. The pipeline may break; the lane goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequence_
from functools import partial

from gateway.engine.choice import ChoiceState
from gateway.engine.drain import Pace, Remainder
from gateway.engine.invariants import LaneState
from gateway.engine.poison import StageProgress, judge, steps_in_doubt
from gateway.engine.step import build_step
from gateway.engine.takeover import Standing, standing
from gateway.engine.track import Track
from gateway.engine.watch import StepFeed, describe_step
from gateway.grammar import Outbox
from gateway.metrics import Metrics
from gateway.pipelines.form import Chain
from gateway.pipelines.pipeline import Pipeline
from gateway.sampling import Choice, choose_rows
from gateway.scheduler import PROBE_PRIORITY, MicroBatch, Scheduler, Sequence, StepTiming, check_integrity
from stageline.errors import (
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    StagelineError,
    UnavailableError,
)
from stageline.stage.v1 import stage_service_pb2 as pb

RECENT = 0.2  # weight of the newest step
SEQUENCE_COST_TOKENS = 64
"""A sequence that decodes holds up a newcomer about as much as this many prompt tokens (a step, against a prefill)."""


class Lane:
    """Sequences, the scheduler that owns their blocks, and the driver of the current pipeline."""

    def __init__(
        self,
        name: str,
        make_scheduler: Callable[[Pipeline], Scheduler],
        feed: StepFeed,
        metrics: Metrics,
        *,
        unready_after_s: float,
        check_integrity: bool = False,
    ) -> None:
        self.name = name
        self._feed = feed
        self.state = "forming"
        self.scheduler: Scheduler | None = None
        self.pipeline: Pipeline | None = None
        self.stages: Chain = ()  # replicas in use; set before they are claimed, so that no other lane takes them
        self.num_recoveries = 0
        self._make_scheduler, self._metrics, self._check_integrity = make_scheduler, metrics, check_integrity
        self._choices: dict[int, ChoiceState | Track] = {}
        self._sent: dict[int, tuple[MicroBatch, float]] = {}  # by step id; when, on the monotonic clock
        self._outbox = Outbox()
        self.num_tokens = 0
        """Tokens of requests since the pipeline was opened."""
        self._unready_after_s = unready_after_s
        self._moved_s = 0.0  # when a step came back, or the first of several was sent; on the monotonic clock
        self._handling_s = 0.0  # what the last result took here, until the next step was sent
        self.draining = False
        """A stage is about to stop: new work goes elsewhere if there is an elsewhere."""
        self._token_s: float | None = None  # from one token of a sequence to the next, a moving average

    @property
    def load(self) -> int:
        """Sequences here, running or waiting."""
        return len(self._choices)

    def quiet_s(self) -> float:
        """Seconds since a step came back, or since the first of those that are out was sent."""
        return time.monotonic() - self._moved_s

    @property
    def moving(self) -> bool:
        """Whether requests can be served now: the pipeline is proven, and steps that are out come back."""
        return self.state == "ready" and (not self._sent or self.quiet_s() < self._unready_after_s)

    @property
    def busy(self) -> bool:
        """Whether steps are out whose return will still give blocks back."""
        in_flight = self.scheduler is not None and self.scheduler.num_in_flight > 0
        return in_flight and self.pipeline is not None and not self.pipeline.broken.is_set()

    def cost_tokens(self, sequence: Sequence) -> int:
        """What stands between a new sequence and its first token here, in prompt tokens to compute."""
        if self.scheduler is None:
            return sequence.num_tokens
        ahead = self.scheduler.backlog_tokens + self.load * SEQUENCE_COST_TOKENS
        return ahead + sequence.num_tokens - self.scheduler.num_cached_tokens(sequence)

    async def open(self, pipeline: Pipeline, on_draining: Callable[[str, float], None]) -> None:
        """Claim and wire a chain. Every sequence waits to be computed again; `pump` makes them go on."""
        await pipeline.open(self._on_result, on_draining)
        self._sent.clear()
        self._moved_s = time.monotonic()
        self._outbox.clear()
        self.num_tokens = 0
        self._token_s = None
        if self.scheduler is None:
            self.scheduler = self._make_scheduler(pipeline)
        elif self.scheduler.block_size_tokens != pipeline.block_size_tokens:
            raise UnavailableError(
                "BLOCK_SIZE_CHANGED",
                f"the new stages have KV blocks of {pipeline.block_size_tokens} tokens, the pipeline began with "
                f"{self.scheduler.block_size_tokens}; start them from one configuration",
            )
        else:
            self.scheduler.max_in_flight = pipeline.max_in_flight
            self.scheduler.num_stages = len(pipeline.stages)
            for sequence in self.scheduler.reset(pipeline.num_blocks):
                error = ResourceExhaustedError(
                    "KV_CACHE_TOO_SMALL", "the pipeline was replaced by one whose KV cache cannot hold this request"
                )
                self._choices.pop(sequence.sequence_id).fail(error)
        self.pipeline = pipeline

    def on_deaths(self, progress: Sequence_[StageProgress | None]) -> None:
        """The pipeline broke and `progress` is where its stages were: sequences that stages died of run alone or fail."""
        if self.scheduler is None:
            return
        suspects = {}
        for place, step_ids in steps_in_doubt(progress, self._sent).items():
            rows = [row for step_id in step_ids for row in self._sent[step_id][0].rows]
            live = {row.sequence.sequence_id: row.sequence for row in rows if not row.sequence.finished}
            stage = self.stages[place]
            suspects[str(stage.layers)] = [sequence for sequence in live.values() if sequence.priority < PROBE_PRIORITY]
        verdict = judge(suspects)
        for sequence in verdict.alone:
            self.scheduler.run_alone(sequence.sequence_id)
        for sequence in verdict.poisonous:
            choice = self._choices[sequence.sequence_id]
            choice.fail(
                InternalError(
                    "POISON_REQUEST",
                    "every stage process that computed this request, the last time alone, died; it is not tried again",
                    deaths=max(sequence.deaths.values()),
                )
            )
            self._drop(choice)

    def detach(self) -> None:
        """The pipeline is over; sequences stay and wait for the next one."""
        self.pipeline = None
        self.draining = False
        self.state = "forming" if self.scheduler is None else "recovering"

    @property
    def full(self) -> bool:
        """Whether the queue takes nothing more."""
        try:
            self.check_room()
        except ResourceExhaustedError:
            return True
        return False

    def check_room(self) -> None:
        """Raises ResourceExhaustedError QUEUE_FULL where even a sequence of one token would not be queued."""
        assert self.scheduler is not None
        self.scheduler.check_room(1)

    def add(self, choice: ChoiceState | Track, *, bounded: bool = True) -> None:
        """Take a sequence; `pump` makes it go. Raises ResourceExhaustedError (if `bounded`) or InvalidArgumentError where it
        cannot be queued."""
        assert self.scheduler is not None
        self.scheduler.add(choice.sequence, bounded=bounded)
        self._choices[choice.sequence.sequence_id] = choice

    def adopt(self, choice: ChoiceState | Track) -> None:
        """Take a sequence however many wait, and pump; it fails if it could never be held."""
        try:
            self.add(choice, bounded=False)
        except StagelineError as error:
            choice.fail(error)
        self.pump()

    def take(self, choice: ChoiceState | Track) -> None:
        """Give one sequence away, steps of it in flight or not: what they bring is ignored, and computed again elsewhere."""
        if self._drop(choice):
            choice.move()

    def pace(self) -> Pace:
        """What computing takes here now."""
        scheduler = self.scheduler
        return Pace(
            token_s=self._token_s,
            prefill_token_s=None if scheduler is None else scheduler.costs.prefill_token_s(0),
            backlog_tokens=0 if scheduler is None else scheduler.backlog_tokens,
        )

    def standing(self) -> Standing:
        """What it has for sequences of other pipelines."""
        return standing(self.scheduler, self.pace(), self.load)

    def remainders(self) -> list[tuple[ChoiceState | Track, Remainder]]:
        """The sequences of requests, and what each has before it."""
        return [
            (choice, _remainder(choice))
            for choice in self._choices.values()
            if choice.sequence.priority < PROBE_PRIORITY
        ]

    def cancel(self, choice: ChoiceState | Track) -> None:
        """Drop a sequence; its blocks go back as soon as nothing in flight touches them."""
        if self._drop(choice):
            self.pump()

    def _drop(self, choice: ChoiceState | Track) -> bool:
        if self._choices.pop(choice.sequence.sequence_id, None) is None:
            return False
        assert self.scheduler is not None
        self.scheduler.cancel(choice.sequence.sequence_id)
        return True

    def fail_all(self, error: StagelineError) -> None:
        """End every request here."""
        for choice in list(self._choices.values()):
            choice.fail(error)
            self.cancel(choice)

    def pump(self) -> None:
        """Send micro-batches while the scheduler has any and the pipeline has room."""
        if self.pipeline is None or self.scheduler is None or self.pipeline.broken.is_set():
            return
        now_s = time.monotonic()
        for sequence in self.scheduler.expire(now_s):
            self._choices.pop(sequence.sequence_id).fail(deadline_exceeded())
        while (batch := self.scheduler.schedule()) is not None:
            # The choices of now: one may be cancelled while its micro-batch waits for a mask.
            choices = {row.sequence.sequence_id: self._choices[row.sequence.sequence_id] for row in batch.rows}
            outputs = (choices[row.sequence.sequence_id] for row in batch.rows if row.wants_output)
            masks = [choice.masks.ready for choice in outputs if choice.masks is not None]
            self._outbox.put(masks, partial(self._send, self.pipeline, batch, choices))

    def _send(self, pipeline: Pipeline, batch: MicroBatch, choices: Mapping[int, ChoiceState | Track]) -> None:
        if pipeline is self.pipeline and not pipeline.broken.is_set():
            now_s = time.monotonic()
            if not self._sent:
                self._moved_s = now_s
            self._sent[batch.step_id] = batch, now_s
            pipeline.send(build_step(batch, choices))
        for choice in choices.values():
            if choice.ended:  # its grammar failed
                self._drop(choice)

    def holdings(self) -> LaneState:
        """For the check of an idle engine."""
        return LaneState(
            name=self.name,
            num_choices=len(self._choices),
            num_probes=sum(choice.sequence.priority >= PROBE_PRIORITY for choice in self._choices.values()),
            num_sent=len(self._sent),
            num_held=len(self._outbox),
            scheduler=self.scheduler,
        )

    def _on_result(self, result: pb.StepResult) -> None:
        assert self.scheduler is not None
        arrived_s = time.monotonic()
        batch, sent_s = self._sent.pop(result.step_id)
        self._moved_s = arrived_s
        if result.HasField("error"):
            cause = result.error
            error = InternalError(
                cause.reason,
                f"the stage with layers {cause.stage} could not execute the step: {cause.message}",
                stage=cause.stage,
            )
            for sequence in self.scheduler.fail(result.step_id):
                self._choices.pop(sequence.sequence_id).fail(error)
        else:
            if self._feed.watched and self.pipeline is not None:
                self._feed.publish(
                    describe_step(self.name, self.pipeline.epoch, batch, result, sent_s=sent_s, returned_s=arrived_s)
                )
            if self._feed.works and self.pipeline is not None:
                self._feed.trace(self.name, self.pipeline.epoch, batch, result, sent_s=sent_s, returned_s=arrived_s)
            ring_s = arrived_s - sent_s + self._handling_s
            if not any(row.is_prefill for row in batch.rows):
                self._token_s = ring_s if self._token_s is None else self._token_s + RECENT * (ring_s - self._token_s)
            timing = step_timing(result, ring_s)
            self._on_rows(batch, {row.sequence_id: row for row in result.rows}, timing, arrived_s)
        self.pump()
        self._handling_s = time.monotonic() - arrived_s
        if self._check_integrity and not self.scheduler.num_in_flight:
            check_integrity(self.scheduler)

    def _on_rows(
        self, batch: MicroBatch, results: dict[int, pb.RowResult], timing: StepTiming | None, arrived_s: float
    ) -> None:
        assert self.scheduler is not None
        wanted: list[tuple[ChoiceState, pb.RowResult, int]] = []
        chosen: dict[int, Choice] = {}
        for row in batch.rows:
            sequence_id = row.sequence.sequence_id
            choice = self._choices.get(sequence_id)
            if choice is None or not (row.wants_output or row.target_ids):  # cancelled on the way, or a prefill chunk
                continue
            if choice.sequence is not row.sequence:  # it was moved away and came back
                continue
            forced = row.sequence.forced_token_id
            try:
                if row.target_ids:
                    choice.add_scores(_result(results, sequence_id), row)
                if row.wants_output and forced is not None:
                    chosen[sequence_id] = Choice(forced, None)
                elif row.wants_output:
                    assert isinstance(choice, ChoiceState)
                    wanted.append((choice, _result(results, sequence_id), row.output_position))
            except StagelineError as error:
                choice.fail(error)
                self._drop(choice)
        answers = choose_rows(
            [result for _, result, _ in wanted],
            [choice.params for choice, _, _ in wanted],
            choice_indices=[choice.index for choice, _, _ in wanted],
            positions=[position for _, _, position in wanted],
        )
        for (choice, result, _), answer in zip(wanted, answers, strict=True):
            if isinstance(answer, StagelineError):
                choice.fail(answer)
                self._drop(choice)
            else:
                chosen[result.sequence_id] = answer
        tokens = {sequence_id: c.token_id for sequence_id, c in chosen.items()}
        self.scheduler.complete(batch.step_id, tokens, timing=timing)
        for sequence_id, token in chosen.items():
            choice = self._choices[sequence_id]
            try:
                ended = choice.append(token.token_id, token.logprobs)
            except StagelineError as error:
                choice.fail(
                    InternalError("TOKEN_UNKNOWN", f"the model chose what its tokenizer does not know: {error}")
                )
                ended = True
            if choice.sequence.priority < PROBE_PRIORITY:
                self.num_tokens += 1
                if isinstance(choice, ChoiceState):
                    choice.measure(self._metrics, arrived_s)
            if ended:
                self._drop(choice)
            elif isinstance(choice, ChoiceState) and (mask := choice.late_mask) is not None:
                self._hold(self.scheduler, sequence_id, mask)

    def _hold(self, scheduler: Scheduler, sequence_id: int, mask: asyncio.Future[bytes]) -> None:
        """Let no step wait for the mask that a slow grammar is making."""

        def go_on(_: object) -> None:
            scheduler.let_go(sequence_id)
            self.pump()

        scheduler.hold(sequence_id)
        mask.add_done_callback(go_on)


def step_timing(result: pb.StepResult, ring_s: float) -> StepTiming | None:
    """What a step cost; `ring_s` is the time from one use of its slot in the pipeline to the next. None without timings."""
    if not result.timings:
        return None
    stages_s = sum(stage.finished_ns - stage.received_ns for stage in result.timings) / 1e9
    slowest_s = max(stage.finished_ns - stage.started_ns for stage in result.timings) / 1e9
    return StepTiming(slowest_stage_s=slowest_s, overhead_s=max(0.0, ring_s - stages_s))


def deadline_exceeded() -> DeadlineExceededError:
    """The error of a request whose deadline has come."""
    return DeadlineExceededError("DEADLINE_EXCEEDED", "the request's deadline passed before it ended")


def _remainder(choice: ChoiceState | Track) -> Remainder:
    sequence = choice.sequence
    most = sequence.max_total_tokens - sequence.num_tokens
    return Remainder(
        left_tokens=None if isinstance(choice, Track) else most,
        num_tokens=sequence.num_tokens,
        begun=sequence.num_computed_tokens > 0,
        suspected=sequence.run_alone,
    )


def _result(results: Mapping[int, pb.RowResult], sequence_id: int) -> pb.RowResult:
    if sequence_id not in results:
        raise InternalError("RESULT_MISSING", "the last stage answered a step without one of its rows")
    return results[sequence_id]
