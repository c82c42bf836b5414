"""What a simulation found."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Figures of the time after the warm-up. Times in seconds.

    `utilization` is, for each stage, the share of time in which it computed steps that came back, averaged over pipelines;
    `idle_share` the rest. `gateway_utilization` is that of the busiest gateway. `recovery_pauses_s`: for every sequence that
    a death interrupted and that went on, the time from the death to its next token.
    """

    duration_s: float
    requests: int
    completed: int
    refused: int
    unfinished: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_s: dict[str, float]
    itl_s: dict[str, float]
    end_to_end_s: dict[str, float]
    utilization: tuple[float, ...]
    gateway_utilization: float
    rows_per_step: float
    preemptions: int
    deaths: int
    moved_sequences: int
    recovery_pauses_s: dict[str, float]
    availability: float

    @property
    def idle_share(self) -> tuple[float, ...]:
        """Of each stage."""
        return tuple(1 - busy for busy in self.utilization)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"idle_share": self.idle_share}


def percentiles(values: Sequence[float] | array[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile (nearest rank) and maximum; empty where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    shares = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    return {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in shares}
