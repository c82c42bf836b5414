"""Batches on the wire. Pure."""

from __future__ import annotations

from gateway.batch.types import Batch
from stageline.batch.v1 import batch_service_pb2 as pb

_STATUSES = {
    "in_progress": pb.BATCH_STATUS_IN_PROGRESS,
    "completed": pb.BATCH_STATUS_COMPLETED,
    "cancelling": pb.BATCH_STATUS_CANCELLING,
    "cancelled": pb.BATCH_STATUS_CANCELLED,
    "expired": pb.BATCH_STATUS_EXPIRED,
}


def to_message(batch: Batch) -> pb.Batch:
    """The batch on the wire."""
    return pb.Batch(
        id=batch.id,
        input_file_id=batch.input_file_id,
        endpoint=batch.endpoint,
        status=_STATUSES[batch.status],
        num_total=batch.total,
        num_completed=batch.completed,
        num_failed=batch.failed,
        created_s=batch.created_s,
        window_s=batch.window_s or 0,
        completed_s=batch.completed_s or 0,
        cancelling_s=batch.cancelling_s or 0,
        cancelled_s=batch.cancelled_s or 0,
        expired_s=batch.expired_s or 0,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        metadata=batch.metadata,
    )


def from_message(batch: pb.Batch) -> Batch:
    """The batch from the wire; the inverse of `to_message` but for the tenant."""
    statuses = {number: name for name, number in _STATUSES.items()}
    return Batch(
        id=batch.id,
        input_file_id=batch.input_file_id,
        endpoint=batch.endpoint,
        status=statuses[batch.status],  # type: ignore[arg-type]
        total=batch.num_total,
        completed=batch.num_completed,
        failed=batch.num_failed,
        created_s=batch.created_s,
        window_s=batch.window_s or None,
        completed_s=batch.completed_s or None,
        cancelling_s=batch.cancelling_s or None,
        cancelled_s=batch.cancelled_s or None,
        expired_s=batch.expired_s or None,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        metadata=dict(batch.metadata),
    )
