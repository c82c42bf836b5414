"""How many pipelines there should be: a pure function of what the gateways say they have to do.

Imports nothing but the standard library: Ray Serve pickles a policy and runs it in its controller. Serve applies
the delays, which are alike for all stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

STAGE_PREFIX = "stage-"
"""Names of the deployments that are scaled together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one gateway has to do.

    `queued_tokens` are prompt tokens not computed yet, of all that wait, also for a pipeline to appear. `kv_pipelines` is
    the KV cache in use, in caches of a whole pipeline. `late_sequences` wait longer than their deadlines allow, as far as
    the queue's rate tells. `batch_backlog_tokens` are those of batch work that waits for idle pipelines.
    """

    pipelines: float = 0
    sequences: float = 0
    queued_tokens: float = 0
    kv_pipelines: float = 0
    late_sequences: float = 0
    batch_backlog_tokens: float = 0

    def stats(self) -> dict[str, float]:
        """As Serve carries them: names and numbers."""
        return {f"stageline_{name}": float(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What one pipeline is good for."""

    sequences: int = 64
    queued_tokens: int = 65536
    kv_fraction: float = 0.8
    batch_backlog_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        if min(self.sequences, self.queued_tokens, self.kv_fraction, self.batch_backlog_tokens) <= 0:
            raise ValueError("autoscaling targets must be over 0")


def pipelines_wanted(demands: Iterable[Demand], targets: Targets) -> int:
    """The least number of pipelines that meets every target; 0 when there is nothing to do. Not bounded."""
    total = {field.name: 0.0 for field in fields(Demand)}
    for demand in demands:
        for name, value in asdict(demand).items():
            total[name] += value
    wanted = max(
        math.ceil(total["sequences"] / targets.sequences),
        math.ceil(total["queued_tokens"] / targets.queued_tokens),
        math.ceil(total["kv_pipelines"] / targets.kv_fraction),
        math.ceil(total["batch_backlog_tokens"] / targets.batch_backlog_tokens),
    )
    if total["late_sequences"]:  # more than there are, whatever the averages say
        wanted = max(wanted, int(total["pipelines"]) + 1)
    return wanted


class LockstepPolicy:
    """Ray Serve's application-level policy: one number for every stage deployment.

    `gateways` is the number of gateways, each of which must have reported. Where one has not (its metric is missing, which is
    not zero), every stage keeps the highest target there is: a stage that lags catches up, none shrinks.
    """

    def __init__(self, *, gateways: int = 1, **targets: float) -> None:
        self._gateways, self._targets = gateways, Targets(**targets)  # type: ignore[arg-type]

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """`contexts`: Serve's AutoscalingContext by DeploymentID. Returns (replicas by DeploymentID, no state)."""
        stages = {key: context for key, context in contexts.items() if key.name.startswith(STAGE_PREFIX)}
        demands = [one for key, context in contexts.items() if key not in stages for one in latest(context.raw_metrics)]
        if len(demands) < self._gateways:
            wanted = max((context.target_num_replicas for context in stages.values()), default=0)
        else:
            wanted = pipelines_wanted(demands, self._targets)
        for context in stages.values():  # the same for all of them
            wanted = min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)
        return dict.fromkeys(stages, wanted), {}


def latest(raw_metrics: Mapping[str, Mapping[Any, Any]]) -> list[Demand]:
    """The newest demand of each gateway replica that reported all of its parts. Serve's own mean over its look-back window
    would hide a burst for half a minute."""
    parts: dict[Any, dict[str, float]] = {}
    for field in fields(Demand):
        for replica, series in (raw_metrics or {}).get(f"stageline_{field.name}", {}).items():
            if series:
                parts.setdefault(replica, {})[field.name] = max(series, key=lambda point: point.timestamp).value
    return [Demand(**values) for values in parts.values() if len(values) == len(fields(Demand))]
