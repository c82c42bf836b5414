"""Which stage replicas exist. Serve's membership, or a static list, feeds one registry."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc.aio

from stageline.errors import StagelineError, UnavailableError
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.partition import LayerRange
from stages.server.access import OPEN, StageAccess
from stages.server.link import OPTIONS

logger = logging.getLogger("stageline.gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord:
    """One stage replica: where it listens and what it holds.

    A `bindable` one can be bound to any stage that fits into its `memory_bytes`; unbound it holds layers [0, 0), also
    while it is `loading`.
    """

    address: str
    incarnation: str
    fingerprint: str
    start_layer: int
    end_layer: int
    num_layers: int
    pid: int = 0
    node: str = ""
    bindable: bool = False
    loading: bool = False
    memory_bytes: int = 0

    @property
    def layers(self) -> LayerRange:
        """The stage it holds."""
        return LayerRange(self.start_layer, self.end_layer)

    @property
    def bound(self) -> bool:
        """Whether it holds a stage."""
        return self.end_layer > self.start_layer


class Registry:
    """All replicas that are known, by the source that reports them. Belongs to one event loop."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[ReplicaRecord, ...]] = {}
        self._held: dict[str, tuple[int, int, bool]] = {}  # incarnation → layers, and whether it loads
        self.on_change: Callable[[], None] = lambda: None

    def set_replicas(self, source: str, records: Sequence[ReplicaRecord]) -> None:
        """Replace what one source reports."""
        self._sources[source] = tuple(records)
        known = self._reported()
        self._held = {name: held for name, held in self._held.items() if name in known}
        self.on_change()

    def hold(self, incarnation: str, start_layer: int, end_layer: int, *, loading: bool = False) -> None:
        """What a bindable replica holds now; sources may say what it was when it started: nothing."""
        held = start_layer, end_layer, loading
        if self._held.get(incarnation, (0, 0, False)) != held:
            self._held[incarnation] = held
            self.on_change()

    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """Every replica, once."""
        return tuple(map(self._now, self._reported().values()))

    def _reported(self) -> dict[str, ReplicaRecord]:
        return {record.incarnation: record for records in self._sources.values() for record in records}

    def _now(self, record: ReplicaRecord) -> ReplicaRecord:
        if record.bound or (held := self._held.get(record.incarnation)) is None:
            return record
        start_layer, end_layer, loading = held
        return replace(record, start_layer=start_layer, end_layer=end_layer, loading=loading)


class StaticDiscovery:
    """Feeds a registry from a fixed list of addresses, for people without Ray: asks each of them what it is, again and
    again, so that a stage that was restarted on its address is found."""

    def __init__(
        self, addresses: Sequence[str], registry: Registry, *, interval_s: float = 1.0, access: StageAccess = OPEN
    ) -> None:
        self._addresses, self._registry, self._interval_s = tuple(addresses), registry, interval_s
        self._access = access
        self._known: dict[str, ReplicaRecord] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask every address once, then go on in the background."""
        await self._refresh()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ask no more; what was found stays registered."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._refresh()

    async def _refresh(self) -> None:
        asked = (record_at(address, self._interval_s + 1, self._access) for address in self._addresses)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        known: dict[str, ReplicaRecord] = {}
        for address, answer in zip(self._addresses, answers, strict=True):
            if isinstance(answer, ReplicaRecord):
                known[address] = answer
            elif not isinstance(answer, StagelineError):
                raise answer
            elif address in self._known:
                logger.warning("%s", answer.message)
        if known != self._known:
            self._known = known
            self._registry.set_replicas("static", tuple(known.values()))


async def describe(address: str, timeout_s: float = 5.0, access: StageAccess = OPEN) -> pb.DescribeResponse:
    """Ask a stage server what it is. Raises UnavailableError where nobody answers."""
    async with access.channel(address, OPTIONS) as channel:
        try:
            return await pb_grpc.StageServiceStub(channel).Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(
                "STAGE_UNREACHABLE", f"no stage answers at {address}: {error.details()}", address=address
            ) from None


async def record_at(address: str, timeout_s: float = 5.0, access: StageAccess = OPEN) -> ReplicaRecord:
    """The replica that listens at an address. Raises UnavailableError where nobody answers."""
    answer = await describe(address, timeout_s, access)
    return ReplicaRecord(
        address=address,
        incarnation=answer.incarnation,
        fingerprint=answer.fingerprint,
        start_layer=answer.start_layer,
        end_layer=answer.end_layer,
        num_layers=answer.num_layers,
        pid=answer.pid,
        node=address.rpartition(":")[0],
        bindable=answer.bindable,
        loading=answer.HasField("loading"),
        memory_bytes=answer.memory_bytes,
    )


def new_owner_id() -> str:
    """Unique per process, so that a restarted gateway is another owner."""
    return f"gateway-{uuid.uuid4().hex}"
