"""What `stageline status` shows of a lane and of replicas."""

from __future__ import annotations

from gateway.engine.lane import Lane
from gateway.pipelines.discovery import ReplicaRecord
from gateway.types import PipelineStatus, ReplicaStatus


def pipeline_status(lane: Lane) -> PipelineStatus:
    """A lane; its epoch and blocks are 0 while it has no pipeline."""
    pipeline, scheduler = lane.pipeline, lane.scheduler
    return PipelineStatus(
        id=lane.name,
        epoch=pipeline.epoch if pipeline else 0,
        state=_state(lane),
        stages=tuple(replica_status(stage, "connected" if pipeline else "claimed") for stage in lane.stages),
        num_blocks=pipeline.num_blocks if pipeline else 0,
        num_free_blocks=scheduler.num_free_blocks if scheduler else 0,
        num_running_sequences=scheduler.num_running if scheduler else 0,
        num_waiting_sequences=scheduler.num_waiting if scheduler else 0,
        num_waiting_tokens=scheduler.num_waiting_tokens if scheduler else 0,
        num_preemptions=scheduler.num_preemptions if scheduler else 0,
        num_recoveries=lane.num_recoveries,
    )


def replica_status(record: ReplicaRecord, state: str) -> ReplicaStatus:
    """A replica, used or spare."""
    return ReplicaStatus(
        pid=record.pid,
        node=record.node,
        address=record.address,
        state=state if record.bound else "loading" if record.loading else "unbound",
        layers=str(record.layers) if record.bound else "any",
    )


def _state(lane: Lane) -> str:
    if lane.state != "ready":
        return lane.state
    return "stalled" if not lane.moving else "draining" if lane.draining else "ready"
