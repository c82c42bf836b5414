"""Steps as Chrome trace events, which Perfetto and chrome://tracing show (the Trace Event Format's JSON object form)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stageline.operations.v1 import operations_service_pb2 as pb

Event = dict[str, Any]

GATEWAY_ROW = 0  # thread id of the gateway's track; stage i has i + 1


def chrome_trace(steps: Sequence[pb.Step]) -> dict[str, Any]:
    """One process per pipeline; in it a track of steps in flight and one per stage. `steps` on one clock."""
    begin_ns = min((step.sent_ns for step in steps), default=0)
    process_ids = {name: index for index, name in enumerate(sorted({step.pipeline for step in steps}), start=1)}
    events: list[Event] = []
    for name, process_id in process_ids.items():
        events += _names(process_id, name, next(step for step in steps if step.pipeline == name))
    for step in steps:
        events += _step_events(step, process_ids[step.pipeline], begin_ns)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(process_id: int, pipeline: str, step: pb.Step) -> Iterator[Event]:
    def named(kind: str, row: int, value: Any) -> Event:
        key = "sort_index" if kind.endswith("sort_index") else "name"
        return {"ph": "M", "name": kind, "pid": process_id, "tid": row, "args": {key: value}}

    yield named("process_name", GATEWAY_ROW, f"pipeline {pipeline}")
    yield named("thread_name", GATEWAY_ROW, "gateway")
    for row, stage in enumerate(step.stages, start=GATEWAY_ROW + 1):
        yield named("thread_name", row, f"stage {row - 1}, layers {stage.layers}")
        yield named("thread_sort_index", row, row)


def _step_events(step: pb.Step, process_id: int, begin_ns: int) -> Iterator[Event]:
    def us(time_ns: int) -> float:
        return (time_ns - begin_ns) / 1e3

    about = {"epoch": step.epoch, "step": step.step_id,
             "decode tokens": step.num_decode_tokens, "prefill tokens": step.num_prefill_tokens}  # fmt: skip
    name = f"step {step.step_id}"
    # Steps in flight overlap: nestable asynchronous events, which viewers put side by side.
    identity = {"cat": "step", "id": f"{step.pipeline}/{step.epoch}/{step.step_id}", "pid": process_id}
    common = {**identity, "name": name, "tid": GATEWAY_ROW}
    yield {**common, "ph": "b", "ts": us(step.sent_ns), "args": about}
    yield {**common, "ph": "e", "ts": us(step.returned_ns)}
    for row, stage in enumerate(step.stages, start=GATEWAY_ROW + 1):
        args = {**about, "waited, ms": (stage.started_ns - stage.received_ns) / 1e6, "CPU, ms": stage.cpu_ns / 1e6}
        yield {
            "ph": "X", "name": name, "cat": "prefill" if step.num_prefill_tokens else "decode",
            "pid": process_id, "tid": row, "ts": us(stage.started_ns),
            "dur": (stage.finished_ns - stage.started_ns) / 1e3, "args": args,
        }  # fmt: skip
