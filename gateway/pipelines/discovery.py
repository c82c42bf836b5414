"""Which stage replicas exist. Serve's membership, or a static list, feeds one registry."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from stageline.errors import UnavailableError
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.server.link import OPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord:
    """One stage replica: where it listens and what it holds."""

    address: str
    incarnation: str
    fingerprint: str
    start_layer: int
    end_layer: int
    num_layers: int
    pid: int = 0
    node: str = ""


class Registry:
    """All replicas that are known, by the source that reports them. Belongs to one event loop."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[ReplicaRecord, ...]] = {}
        self.on_change: Callable[[], None] = lambda: None

    def set_replicas(self, source: str, records: Sequence[ReplicaRecord]) -> None:
        """Replace what one source reports."""
        self._sources[source] = tuple(records)
        self.on_change()

    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """Every replica, once."""
        return tuple({record.incarnation: record for records in self._sources.values() for record in records}.values())


async def describe(address: str, timeout_s: float = 5.0) -> ReplicaRecord:
    """Ask a stage server what it is, for people without Ray. Raises UnavailableError where nobody answers."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        try:
            answer = await pb_grpc.StageServiceStub(channel).Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(
                "STAGE_UNREACHABLE", f"no stage answers at {address}: {error.details()}", address=address
            ) from None
    return ReplicaRecord(
        address=address,
        incarnation=answer.incarnation,
        fingerprint=answer.fingerprint,
        start_layer=answer.start_layer,
        end_layer=answer.end_layer,
        num_layers=answer.num_layers,
        pid=answer.pid,
        node=address.rpartition(":")[0],
    )


def new_owner_id() -> str:
    """Unique per process, so that a restarted gateway is another owner."""
    return f"gateway-{uuid.uuid4().hex}"
