"""Steps as they come back from the pipelines, for whoever watches them and for traces. Free while nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from gateway.scheduler import MicroBatch, ScheduledRow
from gateway.tracing.work import RequestWork
from stageline.operations.v1 import operations_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2 as stage_pb

MAX_UNREAD_STEPS = 4096
SEND_PERIOD_S = 0.1  # steps are told in groups: a message each would cost more than the step's own bookkeeping


class StepFeed:
    """Hands every step to all who watch. Lives on one event loop."""

    def __init__(self) -> None:
        self._unread: set[_Unread] = set()
        self.works: dict[int, RequestWork] = {}
        """Of the sequences, by id, whose requests are traced."""

    def follow(self, work: RequestWork | None, sequence_ids: Iterable[int]) -> None:
        """Put down in `work` what steps do for these sequences, until `forget`."""
        if work is not None:
            self.works.update(dict.fromkeys(sequence_ids, work))

    def forget(self, sequence_ids: Iterable[int]) -> None:
        """The request of these sequences ended."""
        if self.works:
            for sequence_id in sequence_ids:
                self.works.pop(sequence_id, None)

    def trace(
        self, pipeline: str, epoch: int, batch: MicroBatch, result: stage_pb.StepResult, *, sent_s: float, returned_s: float
    ) -> None:  # fmt: skip
        """Put a step down for the traced requests that took part in it."""
        taking_part: dict[RequestWork, list[ScheduledRow]] = {}
        for row in batch.rows:
            if (work := self.works.get(row.sequence.sequence_id)) is not None:
                taking_part.setdefault(work, []).append(row)
        for work, rows in taking_part.items():
            work.add(
                pipeline,
                epoch,
                result.timings,
                num_tokens=sum(row.num_tokens for row in rows),
                num_step_tokens=batch.num_tokens,
                answered=any(row.wants_output and row.sequence.forced_token_id is None for row in rows),
                sent_s=sent_s,
                returned_s=returned_s,
            )

    @property
    def watched(self) -> bool:
        """Whether a step needs to be told at all."""
        return bool(self._unread)

    def publish(self, step: pb.Step) -> None:
        """Tell a step."""
        for unread in self._unread:
            unread.add(step)

    async def watch(self) -> AsyncGenerator[pb.StreamStepsResponse, None]:
        """What happens from now on, in groups; the first group is empty. A reader that is slow misses steps, which are
        counted."""
        unread = _Unread()
        self._unread.add(unread)
        try:
            yield pb.StreamStepsResponse()
            while True:
                await asyncio.sleep(SEND_PERIOD_S)
                if unread.steps:
                    yield unread.take()
        finally:
            self._unread.discard(unread)


class _Unread:
    def __init__(self) -> None:
        self.steps: list[pb.Step] = []
        self._num_dropped = 0

    def add(self, step: pb.Step) -> None:
        if len(self.steps) < MAX_UNREAD_STEPS:
            self.steps.append(step)
        else:
            self._num_dropped += 1

    def take(self) -> pb.StreamStepsResponse:
        response = pb.StreamStepsResponse(steps=self.steps, num_dropped=self._num_dropped)
        self.steps, self._num_dropped = [], 0
        return response


def describe_step(
    pipeline: str, epoch: int, batch: MicroBatch, result: stage_pb.StepResult, *, sent_s: float, returned_s: float
) -> pb.Step:
    """One step as operators see it; `sent_s` and `returned_s` on this process's monotonic clock."""
    prefill_tokens = sum(row.num_tokens for row in batch.rows if row.is_prefill)
    return pb.Step(
        pipeline=pipeline,
        epoch=epoch,
        step_id=batch.step_id,
        num_decode_tokens=sum(row.num_tokens for row in batch.rows) - prefill_tokens,
        num_prefill_tokens=prefill_tokens,
        sent_ns=round(sent_s * 1e9),
        returned_ns=round(returned_s * 1e9),
        stages=[
            pb.StageSpan(
                layers=timing.stage,
                received_ns=timing.received_ns,
                started_ns=timing.started_ns,
                finished_ns=timing.finished_ns,
                cpu_ns=timing.cpu_ns,
            )
            for timing in result.timings
        ],
    )
