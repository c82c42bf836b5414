"""What is simulated: plain values, and the assumptions they stand for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gateway.planner.types import ClusterPlan, Request
from gateway.scheduler import SchedulerLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Who asks for what.

    Open loop: a Poisson process of `requests_per_s`, which swings by `daily_swing` of itself (0: constant) over
    `day_s` seconds, lowest at the start. Closed loop: `streams` clients, each of which sends its next request when the one
    before has ended; then `requests_per_s` is not used. Lengths are log-normal around `prompt_tokens` and `output_tokens`
    (medians) with `sigma`, cut at `max_factor` times the median; `sigma` 0 makes them all equal.
    """

    requests_per_s: float = 1.0
    daily_swing: float = 0.0
    day_s: float = 86400.0
    streams: int = 0
    prompt_tokens: int = 512
    output_tokens: int = 128
    sigma: float = 0.8
    max_factor: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How replicas die, and what happens then.

    Every replica dies after an exponential time of mean `mtbf_s` (None: never), or at the moments `at_s`, each of which
    kills one replica of the first pipeline. `detection_s` is the time until the gateway notices, `takeover_s` that of
    claim, wiring and canary, `restart_s` that until a dead replica is there again (process, weights). Each gateway has
    `spares` replicas that can take any stage.
    """

    mtbf_s: float | None = None
    at_s: tuple[float, ...] = ()
    detection_s: float = 0.05
    takeover_s: float = 1.0
    restart_s: float = 120.0
    spares: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayCost:
    """Seconds that one gateway process, which does one thing at a time, spends on a request, on a step (schedule, build,
    parse, complete) and on an output row of a step (choice, detokenizing, streaming).

    The defaults are assumptions of the size `benchmarks/gateway.py` measures on the development machine.
    """

    request_s: float = 0.002
    step_s: float = 0.0006
    row_s: float = 0.00008


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One simulation: `pipelines` copies of a plan's pipeline, dealt out over `gateways`.

    `duration_s` of arrivals; what happens before `warmup_s` is not counted. Where the plan's devices
    name a `host`, the whole cluster, gateways too, computes on its cores.
    """

    request: Request
    plan: ClusterPlan
    pipelines: int = 1
    gateways: int = 1
    traffic: Traffic = field(default_factory=Traffic)
    failures: Failures = field(default_factory=Failures)
    gateway_cost: GatewayCost = field(default_factory=GatewayCost)
    limits: SchedulerLimits = field(default_factory=lambda: SchedulerLimits(prefix_caching=False))
    duration_s: float = 120.0
    warmup_s: float = 20.0
    seed: int = 0

    def gpu_counts(self) -> dict[str, int]:
        """GPUs of each kind, spares included: what a spare runs on has room for the largest stage."""
        counts = {kind: count * self.pipelines for kind, count in Counter(s.gpu for s in self.plan.stages).items()}
        largest = max(self.plan.stages, key=lambda stage: stage.memory.used_bytes)
        counts[largest.gpu] += self.failures.spares * self.gateways
        return counts

    def __post_init__(self) -> None:
        assert self.plan.fits
        assert 1 <= self.gateways <= self.pipelines
        assert 0 <= self.warmup_s < self.duration_s
