"""How much of the time each stage computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stageline.operations.v1 import operations_service_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShares:
    """One stage between the beginning of its first step and the end of its last.

    `computing`: share of that time in a step, wall clock. `on_cpu`: CPU time of the computing thread over that time (less
    than `computing` where the thread was not running, or a GPU did the work). `waiting_ms`: mean time a step lay there
    before its turn.
    """

    pipeline: str
    layers: str
    num_steps: int
    seconds: float
    computing: float
    on_cpu: float
    waiting_ms: float


def stage_shares(steps: Sequence[pb.Step]) -> list[StageShares]:
    """Of every stage in `steps`; durations are of one clock each, so clocks need not agree."""
    spans: dict[tuple[str, str], list[pb.StageSpan]] = {}
    for step in steps:
        for stage in step.stages:
            if stage.finished_ns:
                spans.setdefault((step.pipeline, stage.layers), []).append(stage)
    return [_shares(pipeline, layers, of) for (pipeline, layers), of in spans.items()]


def _shares(pipeline: str, layers: str, spans: Sequence[pb.StageSpan]) -> StageShares:
    total_ns = max(span.finished_ns for span in spans) - min(span.started_ns for span in spans)
    return StageShares(
        pipeline=pipeline,
        layers=layers,
        num_steps=len(spans),
        seconds=total_ns / 1e9,
        computing=sum(span.finished_ns - span.started_ns for span in spans) / max(1, total_ns),
        on_cpu=sum(span.cpu_ns for span in spans) / max(1, total_ns),
        waiting_ms=sum(span.started_ns - span.received_ns for span in spans) / len(spans) / 1e6,
    )
