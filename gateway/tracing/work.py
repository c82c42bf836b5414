"""Where the time of one request went, from the steps it took part in. Pure; a few numbers a stage, however many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.timeline.clocks import offsets_of
from stageline.stage.v1 import stage_service_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What one stage did in one epoch, in steps that the request took part in; other requests took part in them too.

    `began_s` and `ended_s` are on the gateway's monotonic clock. `num_tokens` are the request's own, `num_step_tokens` all of
    these steps. `computing_s`: in a step, wall clock; `waiting_s`: steps lay there before their turn.
    """

    pipeline: str
    epoch: int
    layers: str
    began_s: float
    ended_s: float
    num_steps: int
    num_tokens: int
    num_step_tokens: int
    computing_s: float
    cpu_s: float
    waiting_s: float


@dataclass(slots=True)
class _Stage:
    layers: str
    began_ns: int
    ended_ns: int = 0
    computing_ns: int = 0
    cpu_ns: int = 0
    waiting_ns: int = 0


@dataclass(slots=True)
class _Epoch:
    stages: list[_Stage]
    shortest_ns: list[int]
    num_steps: int = 0
    num_tokens: int = 0
    num_step_tokens: int = 0


@dataclass(slots=True, eq=False)
class RequestWork:
    """Of one request. Times in seconds on the gateway's monotonic clock, None for what did not happen.

    `sent_s`: its first step went out; `first_token_s`: the first token of any of its choices came back.
    """

    sent_s: float | None = None
    first_token_s: float | None = None
    _epochs: dict[tuple[str, int], _Epoch] = field(default_factory=dict)

    def add(
        self, pipeline: str, epoch: int, timings: Sequence[pb.StageTiming], *,
        num_tokens: int, num_step_tokens: int, answered: bool, sent_s: float, returned_s: float,
    ) -> None:  # fmt: skip
        """A step came back that had `num_tokens` of this request; `answered`: with a token."""
        if self.sent_s is None:
            self.sent_s = sent_s
        if answered and self.first_token_s is None:
            self.first_token_s = returned_s
        if not timings:
            return
        left = [round(sent_s * 1e9), *(timing.finished_ns for timing in timings)]
        arrived = [*(timing.received_ns for timing in timings), round(returned_s * 1e9)]
        hops_ns = [end - start for start, end in zip(left, arrived, strict=True)]
        if (run := self._epochs.get((pipeline, epoch))) is None:
            stages = [_Stage(timing.stage, timing.started_ns) for timing in timings]
            run = self._epochs[pipeline, epoch] = _Epoch(stages, hops_ns)
        run.shortest_ns = list(map(min, run.shortest_ns, hops_ns))
        run.num_steps += 1
        run.num_tokens += num_tokens
        run.num_step_tokens += num_step_tokens
        for stage, timing in zip(run.stages, timings, strict=True):
            stage.ended_ns = timing.finished_ns
            stage.computing_ns += timing.finished_ns - timing.started_ns
            stage.cpu_ns += timing.cpu_ns
            stage.waiting_ns += timing.started_ns - timing.received_ns

    def stages(self) -> list[StageWork]:
        """Every stage of every epoch, in order."""
        return [
            StageWork(
                pipeline=pipeline,
                epoch=epoch,
                layers=stage.layers,
                began_s=(stage.began_ns + offset_ns) / 1e9,
                ended_s=(stage.ended_ns + offset_ns) / 1e9,
                num_steps=run.num_steps,
                num_tokens=run.num_tokens,
                num_step_tokens=run.num_step_tokens,
                computing_s=stage.computing_ns / 1e9,
                cpu_s=stage.cpu_ns / 1e9,
                waiting_s=stage.waiting_ns / 1e9,
            )
            for (pipeline, epoch), run in self._epochs.items()
            for stage, offset_ns in zip(run.stages, offsets_of(run.shortest_ns), strict=True)
        ]
