"""Stages' clocks brought onto the gateway's.

A monotonic clock counts from a start of its own on every host. Messages bound the difference: none arrives before it was
sent. Over a ring of hops gateway → stage 0 → … → gateway the differences cancel, so the shortest way round that was seen
is known; each hop is taken to have the same part of it (as NTP takes both directions of a round trip to be alike,
RFC 5905, section 8). On one host, where the clocks are one, the result is off by what the shortest hops differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from stageline.operations.v1 import operations_service_pb2 as pb


def offsets_ns(steps: Sequence[pb.Step]) -> list[int]:
    """What to add to each stage's times, in nanoseconds. `steps` went through the same stages of one pipeline and epoch."""
    return offsets_of([min(hops) for hops in zip(*map(_hops, steps), strict=True)])


def offsets_of(shortest: Sequence[int]) -> list[int]:
    """The same from the shortest of each hop, on two clocks: its true length plus the difference between them."""
    share = sum(shortest) / len(shortest)  # the differences cancel; never under 0 on clocks that run alike
    offsets, offset = [], 0.0
    for hop in shortest[:-1]:
        offset += share - hop
        offsets.append(round(offset))
    return offsets


def _hops(step: pb.Step) -> list[int]:
    left = [step.sent_ns, *(stage.finished_ns for stage in step.stages)]
    arrived = [*(stage.received_ns for stage in step.stages), step.returned_ns]
    return [end - start for start, end in zip(left, arrived, strict=True)]


def on_one_clock(steps: Sequence[pb.Step]) -> list[pb.Step]:
    """Copies of `steps` with all times on the gateway's clock. Steps that failed on the way are left out."""
    groups: dict[tuple[str, int, int], list[pb.Step]] = {}
    for step in steps:
        if step.stages and all(stage.finished_ns for stage in step.stages):
            groups.setdefault((step.pipeline, step.epoch, len(step.stages)), []).append(step)
    moved = []
    for group in groups.values():
        offsets = offsets_ns(group)
        for step in group:
            copy = pb.Step()
            copy.CopyFrom(step)
            for stage, offset in zip(copy.stages, offsets, strict=True):
                stage.received_ns += offset
                stage.started_ns += offset
                stage.finished_ns += offset
            moved.append(copy)
    return sorted(moved, key=lambda step: step.returned_ns)
