"""Limits of an engine, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.scheduler import SchedulerLimits
from stages.server.access import OPEN, StageAccess


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """`max_waiting_*` bound the queue of one pipeline and that of the requests no pipeline has taken yet; what bounds
    micro-batches and the cache is in SchedulerLimits. Beyond `eager_pipelines` a gateway takes pipelines only once it has run for
    `patience_s`, so that others get theirs first; None: all at once. `check_integrity` lets every idle scheduler verify its invariants
    (tests, debugging). `stage_access`: how stages know us, and we them. After `canary_interval_s` without a step a canary
    proves a pipeline; one whose steps do not come back for `unready_after_s` is not ready. Where only replicas of another model are there for
    `superseded_after_s`, requests end. `max_unread_*` bound what clients leave unread, of one request and of all; see deltas.py.
    """

    max_step_tokens: int = 2048
    max_step_sequences: int = 256
    min_prefill_tokens: int = 16
    max_waiting_sequences: int = 1024
    max_waiting_tokens: int = 1 << 20
    max_request_kv_fraction: float = 0.5
    prefix_caching: bool = True
    lease_s: float = 10.0
    eager_pipelines: int | None = None
    patience_s: float = 30.0
    stall_timeout_s: float = 60.0
    canary_timeout_s: float = 120.0
    canary_interval_s: float = 5.0
    unready_after_s: float = 10.0
    superseded_after_s: float = 30.0
    max_unread_tokens: int = 1 << 16
    max_unread_tokens_total: int = 1 << 21
    check_integrity: bool = False
    stage_access: StageAccess = OPEN

    def limits(self) -> SchedulerLimits:
        """Those of every scheduler."""
        return SchedulerLimits(**{name: getattr(self, name) for name in SchedulerLimits.__dataclass_fields__})
