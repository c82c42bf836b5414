"""The scale table of docs/scale.md: Qwen2-72B on clusters we do not have, simulated. Prints Markdown.

python -m benchmarks.scale pipelines|stages|recovery|day

Every row of `stages` and `pipelines` is three simulations: one stream alone; more streams than fit, which gives the
throughput; and Poisson arrivals at 70 % of the request rate that the second reached, which give the latencies.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from gateway.planner.catalogue import find_model_config, gpus, parse_inventory
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.cost import Link
from gateway.planner.types import Request
from gateway.simulator import Failures, Result, Scenario, Traffic, simulate
from gateway.simulator.recovery import recoveries
from gateway.simulator.result import percentiles

MODEL = "qwen2-72b"
LOAD = 0.7
HEAD = (
    "| GPUs | pipelines × stages | gateways | link | tokens/s | a GPU | ITL alone | TTFT p50 / p99 at 70 % | "
    "ITL p50 / p99 at 70 % | idle, best and worst stage | gateway busy |\n|" + "---|" * 11
)


def scenario(num_stages: int, pipelines: int, gateways: int, gbps: float, gpu: str, **changes: Any) -> Scenario:
    request = Request(
        model=MODEL,
        config=find_model_config(MODEL),
        gpus=parse_inventory(f"{gpu}:{num_stages}", gpus()),
        link=Link(bytes_per_s=gbps * 1e9 / 8),
    )
    return Scenario(request=request, plan=make_cluster_plan(request), pipelines=pipelines, gateways=gateways, **changes)


def row(num_stages: int, pipelines: int, gateways: int, gbps: float, gpu: str, duration_s: float) -> str:
    def run(traffic: Traffic, seconds: float) -> Result:
        return simulate(
            scenario(
                num_stages, pipelines, gateways, gbps, gpu, traffic=traffic, duration_s=seconds, warmup_s=seconds / 2
            )
        )

    alone = run(Traffic(streams=1), 60.0)
    full = run(Traffic(streams=pipelines * 64 * num_stages), duration_s)
    at_load = run(Traffic(requests_per_s=LOAD * full.completed / full.duration_s), duration_s)
    idle = at_load.idle_share
    return (
        f"| {num_stages * pipelines} {gpu} | {pipelines} × {num_stages} | {gateways} | {gbps:g} Gb/s | "
        f"{full.output_tokens_per_s:,.0f} | {full.output_tokens_per_s / num_stages / pipelines:,.0f} | "
        f"{_ms(alone.itl_s['p50'])} | {_ms(at_load.ttft_s['p50'])} / {_ms(at_load.ttft_s['p99'])} | "
        f"{_ms(at_load.itl_s['p50'])} / {_ms(at_load.itl_s['p99'])} | "
        f"{100 * min(idle):.0f} %, {100 * max(idle):.0f} % | {100 * full.gateway_utilization:.0f} % |"
    )


def stages(gpu: str) -> Iterator[str]:
    yield HEAD
    for num_stages in (4, 8, 16):
        for gbps in (1, 10, 25, 100):
            yield row(num_stages, 1, 1, gbps, gpu, 240.0)


def pipelines(gpu: str) -> Iterator[str]:
    yield HEAD
    for count, gateways in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (16, 2), (32, 4), (64, 8)):
        yield row(4, count, gateways, 25, gpu, 120.0)


def recovery(gpu: str) -> Iterator[str]:
    yield (
        "| live tokens | sequences | link | software | way | pause p50 | pause, last sequence | kept a token | sent a token |"
    )
    yield "|" + "---|" * 9
    for groups in (((4, 2048),), ((64, 2048),), ((4, 32768),), ((2, 32768), (32, 2048)), ((200, 2048),)):
        for gbps, software in ((10, 0.95), (25, 0.95), (25, 3.0), (100, 0.95), (100, 9.0)):
            one = scenario(4, 1, 1, gbps, gpu)
            link = Link(bytes_per_s=gbps * 1e9 / 8, software_bytes_per_s=software * 1e9)
            request = Request(model=MODEL, config=one.request.config, gpus=one.request.gpus, link=link)
            lengths = [context for number, context in groups for _ in range(number)]
            sequences = " + ".join(f"{number} × {context:,}" for number, context in groups)
            for way in recoveries(Scenario(request=request, plan=one.plan), lengths, lost_stage=1):
                pause = percentiles(way.pauses_s)
                yield (
                    f"| {sum(lengths):,} | {sequences} | {gbps} Gb/s | {software} GB/s | {way.strategy} | "
                    f"{pause['p50']:.1f} s | {pause['max']:.1f} s | {way.kept_bytes_per_token:,} B | {way.sent_bytes_per_token:,} B |"
                )


def day(gpu: str) -> Iterator[str]:
    """A whole day: two pipelines and a spare GPU, from 0.2 to 1.8 times the average; every replica dies once a day."""
    traffic = Traffic(requests_per_s=4.0, daily_swing=0.8)
    yield "| failures | requests | completed | refused | deaths | TTFT p50 / p99 / max | ITL p50 / p99 / max | pause p50 / max | pipelines up |"
    yield "|" + "---|" * 9
    for name, failures in (
        ("none", Failures()),
        ("each replica once a day, no spare", Failures(mtbf_s=86400)),
        ("each replica once a day, one spare", Failures(mtbf_s=86400, spares=1)),
    ):
        found = simulate(
            scenario(4, 2, 1, 25, gpu, traffic=traffic, failures=failures, duration_s=86400.0, warmup_s=0.0)
        )
        pause = found.recovery_pauses_s
        yield (
            f"| {name} | {found.requests:,} | {found.completed:,} | {found.refused} | {found.deaths} | "
            f"{_three(found.ttft_s)} | {_three(found.itl_s)} | "
            f"{_ms(pause['p50']) + ' / ' + _ms(pause['max']) if pause else 'none'} | {100 * found.availability:.3f} % |"
        )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"


def _three(values: dict[str, float]) -> str:
    return " / ".join(_ms(values[name]) for name in ("p50", "p99", "max"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["stages", "pipelines", "recovery", "day"])
    parser.add_argument("--gpu", default="a100-80g")
    args = parser.parse_args()
    began = time.perf_counter()
    for line in {"stages": stages, "pipelines": pipelines, "recovery": recovery, "day": day}[args.what](args.gpu):
        print(line, flush=True)
    print(f"\nSimulated in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
