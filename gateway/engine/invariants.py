"""What must hold of an engine that has nothing to do: nothing is left of what it did. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.scheduler import Scheduler, check_integrity


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneState:
    """What a lane holds. `num_choices`, `num_probes`: sequences, and those of them that are canaries. `num_sent`: steps
    that have not come back; `num_held`: steps that wait for a mask."""

    name: str
    num_choices: int
    num_probes: int
    num_sent: int
    num_held: int
    scheduler: Scheduler | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What an engine holds. `num_open`: requests whose iterator lives. `num_unplaced`, `unplaced_tokens`: those that no
    pipeline has taken. `num_pipelines`: pipelines whose stages are leased, streams and renewals included; `num_chains`:
    lanes that may have one."""

    num_open: int
    num_unplaced: int
    unplaced_tokens: int
    num_pipelines: int
    num_chains: int
    lanes: tuple[LaneState, ...]


def find_leaks(state: EngineState) -> tuple[str, ...]:
    """A sentence for everything that should not be there; () for an engine that serves requests now.

    Costs time in proportion to all KV blocks.
    """
    if state.num_open:
        return ()
    leaks = []
    if state.num_unplaced or state.unplaced_tokens:
        leaks.append(f"{state.num_unplaced} requests of {state.unplaced_tokens} tokens wait for a pipeline")
    if state.num_pipelines > state.num_chains:
        leaks.append(f"{state.num_pipelines} pipelines hold leases, {state.num_chains} lanes have stages")
    for lane in state.lanes:
        leaks += [f"pipeline {lane.name}: {leak}" for leak in _lane_leaks(lane)]
    return tuple(leaks)


def _lane_leaks(lane: LaneState) -> Sequence[str]:
    if lane.num_choices > lane.num_probes:
        return [f"{lane.num_choices - lane.num_probes} sequences of no request"]
    scheduler = lane.scheduler
    if lane.num_choices or scheduler is None or scheduler.num_in_flight:
        return []  # a canary is on its way, or what was cancelled is on its way back
    leaks = []
    for count, what in (
        (lane.num_sent, "steps are out that the scheduler does not know"),
        (lane.num_held, "steps wait for masks"),
        (scheduler.num_waiting, "queue entries"),
        (scheduler.num_running, "running sequences"),
        (scheduler.num_blocks - scheduler.num_free_blocks, "KV blocks are not free"),
    ):
        if count:
            leaks.append(f"{count} {what}")
    try:
        check_integrity(scheduler)
    except AssertionError as error:
        leaks.append(f"the scheduler's books are wrong: {error or 'see integrity.py'}")
    return leaks
