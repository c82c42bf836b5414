"""What binds a plan, and what would help: the plan is made again with one thing changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gateway.planner.catalogue import Gpu, inventory_text
from gateway.planner.cluster_plan import make_cluster_plan, scaled
from gateway.planner.types import ClusterPlan, Request

RESOURCES = ("memory", "memory bandwidth", "compute", "link bandwidth", "hop latency", "cores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """`throughput_gain` and `latency_gain`: what twice as much of a resource (half the hop latency) would multiply
    tokens a second by, and divide seconds a token by. `binding` is the resource with the largest gain of throughput;
    empty, like the gains, for a plan that does not fit. `cores` are those of a host that all
    stages share. `help` are sentences for people."""

    binding: str
    throughput_gain: Mapping[str, float]
    latency_gain: Mapping[str, float]
    help: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def advise(request: Request, plan: ClusterPlan, known: Mapping[str, Gpu]) -> Advice:
    """Say what limits `plan`, the plan of `request`, or what it takes to fit."""
    if plan.performance is None:
        return Advice(binding="", throughput_gain={}, latency_gain={}, help=tuple(_what_fits(request, known)))
    throughput, latency = {}, {}
    for resource in RESOURCES:
        better = make_cluster_plan(scaled(request, resource, 2.0)).performance
        assert better is not None, "twice of something cannot make a plan stop fitting"
        throughput[resource] = better.tokens_per_s / plan.performance.tokens_per_s
        latency[resource] = plan.performance.latency_s_per_token / better.latency_s_per_token
    binding = max(throughput, key=lambda name: throughput[name])
    help_lines = [
        f"{'half' if name == 'hop latency' else 'twice'} the {name}: "
        f"{throughput[name]:.2f}x tokens/s, {1 / latency[name]:.2f}x seconds a token"
        for name in sorted(RESOURCES, key=lambda name: -throughput[name])
        if throughput[name] > 1.01 or latency[name] > 1.01
    ]
    return Advice(binding=binding, throughput_gain=throughput, latency_gain=latency, help=tuple(help_lines))


def _what_fits(request: Request, known: Mapping[str, Gpu]) -> list[str]:
    """Sentences: more GPUs of the kind there is, or as many of another kind."""
    lines = []
    last = request.gpus[-1]
    free = replace(request, layers=None, num_stages=None)
    if free != request and make_cluster_plan(free).fits:
        lines.append(f"one pipeline of {len(request.gpus)} stages would fit: leave --stages and --layers out")
    for count in range(len(request.gpus) + 1, request.config.num_layers + 1):
        more = (*request.gpus, *[last] * (count - len(request.gpus)))
        if make_cluster_plan(replace(free, gpus=more)).fits:
            lines.append(f"{inventory_text(more)} would fit")
            break
    stages = request.num_stages or len(request.gpus)
    for gpu in sorted(known.values(), key=lambda gpu: (gpu.memory_bytes, gpu.name)):
        same_count = replace(free, gpus=(gpu,) * stages)
        if make_cluster_plan(same_count).fits:
            lines.append(f"{gpu.name}:{stages} would fit")
    return lines or ["no number of these GPUs holds a whole layer and its KV cache; use GPUs with more memory"]
