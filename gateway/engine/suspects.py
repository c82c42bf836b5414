"""Replicas that a gateway passes over for a while: lost ones, those that another gateway owns, and those that drain."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gateway.engine.ownership import Ownership
from gateway.pipelines.discovery import ReplicaRecord, describe
from gateway.pipelines.form import Chain
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.server.access import StageAccess

SUSPECT_S = 5.0  # how long a replica that cannot be claimed is passed over while others can take its place
ASK_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A replica that is passed over until then, on the monotonic clock. `lost`: it is dead, hangs or drains; others are owned by
    another gateway."""

    until_s: float
    lost: bool


class Suspects:
    """By incarnation. `owner_id` is this gateway's; `busy_s` in one kernel, a replica hangs. `lease_s`: see Ownership."""

    def __init__(self, *, owner_id: str, busy_s: float, lease_s: float, access: StageAccess) -> None:
        self._owner_id, self._busy_s, self._access = owner_id, min(SUSPECT_S, busy_s), access
        self._ownership = Ownership(lease_s)
        self._suspects: dict[str, _Suspect] = {}
        self._drain_ends: dict[str, float] = {}  # when it stops, on the monotonic clock

    def forget_all_but(self, incarnations: Collection[str]) -> None:
        """Others are gone."""
        self._suspects = {name: suspect for name, suspect in self._suspects.items() if name in incarnations}
        self._drain_ends = {name: end for name, end in self._drain_ends.items() if name in incarnations}
        self._ownership.forget_all_but(incarnations)

    def drains(self, incarnation: str, remaining_s: float) -> None:
        """It said that it is about to stop."""
        self._suspects[incarnation] = _Suspect(until_s=math.inf, lost=True)
        self._drain_ends.setdefault(incarnation, time.monotonic() + remaining_s)

    def stops_at_s(self, incarnation: str) -> float | None:
        """When one that drains stops, on the monotonic clock; None for others."""
        return self._drain_ends.get(incarnation)

    def trusted(self, records: Iterable[ReplicaRecord]) -> list[ReplicaRecord]:
        """Those that are no suspects now."""
        now_s = time.monotonic()
        self._suspects = {name: suspect for name, suspect in self._suspects.items() if suspect.until_s > now_s}
        return [record for record in records if record.incarnation not in self._suspects]

    def not_draining(self, records: Iterable[ReplicaRecord]) -> list[ReplicaRecord]:
        """Those that may be tried where no trusted ones will do."""
        return [record for record in records if record.incarnation not in self._drain_ends]

    def not_lost(self, records: Iterable[ReplicaRecord]) -> list[ReplicaRecord]:
        """Those that are there, whoever has them."""
        lost = {name for name, suspect in self._suspects.items() if suspect.lost}
        return [record for record in records if record.incarnation not in lost]

    def all_taken(self, records: Iterable[ReplicaRecord]) -> bool:
        """Whether other gateways have all stages that live; see Ownership."""
        living = [record.incarnation for record in self.not_lost(records) if record.end_layer > 0]
        return self._ownership.all_taken(living, time.monotonic())

    async def note(self, stages: Chain) -> None:
        """Ask each stage of a broken pipeline whether it could be claimed again."""
        answers = await asyncio.gather(
            *(describe(s.address, ASK_TIMEOUT_S, self._access) for s in stages), return_exceptions=True
        )
        for stage, answer in zip(stages, answers, strict=True):
            lost = (
                isinstance(answer, BaseException)
                or answer.incarnation != stage.incarnation
                or answer.state == pb.STAGE_STATE_DRAINING
                or answer.busy_s > self._busy_s
            )
            taken = not isinstance(answer, BaseException) and answer.owner_id not in ("", self._owner_id)
            self._ownership.saw(stage.incarnation, taken=taken, now_s=time.monotonic())
            if lost or taken:
                before = self._suspects.get(stage.incarnation, _Suspect(until_s=0.0, lost=False))
                until_s = max(time.monotonic() + SUSPECT_S, before.until_s)
                self._suspects[stage.incarnation] = _Suspect(until_s=until_s, lost=lost or before.lost)
