"""Ten times the requests that can be served, for a minute: who is accepted must not notice, who is refused must hear at once.

    python -m benchmarks.overload --model DIR [--seconds 60] [--factor 10]

Serves with 2 stages and a short queue, then in one run: `capacity` (closed loop, as many streams as can run at once: this
finds the capacity in requests a second), `overload` (open loop, Poisson arrivals at `factor` times that), `after` (as
`capacity`). Prints one JSON object: time between tokens of accepted requests in each phase, how long refusals took as the
client saw it and without the load generator's own delay, resident memory of the gateway, and throughput.

The generator's own delay is how late its event loop was when an answer lay there: a heartbeat measures it all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import here
from benchmarks.servers import serving
from gateway.bench.load import Generator, Outcome, Shape
from gateway.bench.measure import percentiles

SHAPE = Shape(prompt_tokens=32, new_tokens=32)
STREAMS, WAITING = 24, 24
FLAGS = ("--scheduler.max-step-sequences", "8", "--scheduler.max-waiting-sequences", str(WAITING))
"""8 sequences a micro-batch, 3 micro-batches in flight: 24 run at once."""
HEARTBEAT_S = 0.002


class Heartbeat:
    """How late this process' event loop is, every 2 ms."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._late_s: list[float] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due_s = time.perf_counter() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            now_s = time.perf_counter()
            self._times_s.append(now_s)
            self._late_s.append(now_s - due_s)

    def delay_s(self, began_s: float, ended_s: float) -> float:
        """The longest delay of a beat within this time: an answer may have lain there as long before it was seen."""
        first, last = bisect_left(self._times_s, began_s), bisect_right(self._times_s, ended_s + HEARTBEAT_S)
        return max(self._late_s[first:last], default=0.0)

    def percentiles(self) -> dict[str, float]:
        """In milliseconds."""
        return percentiles(self._late_s)


def gateway_process(address: str) -> psutil.Process:
    """The process that listens at this address."""
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise SystemExit(f"no process of ours listens on {address}")


async def with_memory(process: psutil.Process, work: Awaitable[list[tuple[Outcome, float]]]) -> tuple[Any, list[float]]:
    """The result of `work`, and the process' resident MiB every half second meanwhile."""
    sizes: list[float] = []

    async def watch() -> None:
        while True:
            sizes.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(0.5)

    task = asyncio.create_task(watch())
    try:
        return await work, sizes
    finally:
        task.cancel()


async def timed(load: Generator, shape: Shape) -> tuple[Outcome, float]:
    """An outcome and when it was over."""
    outcome = await load.run(shape)
    return outcome, time.perf_counter()


async def closed_loop(load: Generator, seconds: float) -> list[tuple[Outcome, float]]:
    """STREAMS requests at a time."""
    end_s, outcomes = time.perf_counter() + seconds, list[tuple[Outcome, float]]()

    async def stream() -> None:
        while time.perf_counter() < end_s:
            outcomes.append(await timed(load, SHAPE))

    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return outcomes


async def open_loop(load: Generator, seconds: float, rate: float, seed: int) -> list[tuple[Outcome, float]]:
    """Every request at its own moment, however many are under way; a late one does not put off those after it."""
    rng, began_s, tasks = random.Random(seed), time.perf_counter(), []
    due_s = began_s
    while due_s < began_s + seconds:
        if (wait_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(timed(load, SHAPE)))
        due_s += rng.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def figures(
    results: Sequence[tuple[Outcome, float]], heartbeat: Heartbeat, began_s: float, ended_s: float
) -> dict[str, Any]:
    """What happened in [began_s, ended_s)."""
    served = [outcome for outcome, _ in results if not outcome.error]
    refused = [(outcome, over_s) for outcome, over_s in results if outcome.error.startswith("RESOURCE_EXHAUSTED")]
    other = [outcome.error for outcome, _ in results if outcome.error and "RESOURCE_EXHAUSTED" not in outcome.error]
    tokens = sum(began_s <= at < ended_s for outcome in served for at in outcome.token_s)
    waits_s = [over_s - outcome.sent_s for outcome, over_s in refused]
    own_s = [heartbeat.delay_s(outcome.sent_s, over_s) for outcome, over_s in refused]
    found: dict[str, Any] = {
        "offered_per_s": round(len(results) / (ended_s - began_s), 2),
        "served": len(served),
        "refused": len(refused),
        "other_errors": other[:5],
        "output_tokens_per_s": round(tokens / (ended_s - began_s), 1),
        "itl_ms": percentiles([gap for outcome in served for gap in outcome.gaps_s]),
        "ttft_ms": percentiles([outcome.ttft_s for outcome in served]),
    }
    if refused:
        found["refused_after_ms"] = percentiles(waits_s)
        found["refused_after_without_own_delay_ms"] = percentiles(
            [max(0.0, wait - own) for wait, own in zip(waits_s, own_s, strict=True)]
        )
    return found


async def measure(address: str, seconds: float, factor: float) -> dict[str, Any]:
    """The phases in turn."""
    process, heartbeat = gateway_process(address), Heartbeat()
    beating = asyncio.create_task(heartbeat.run())
    phases: dict[str, Any] = {}
    async with Generator(address, seed=1) as load:
        await closed_loop(load, seconds / 6)  # warm
        rate = 0.0
        for name in ("capacity", "overload", "after"):
            began_s = time.perf_counter()
            overload = name == "overload"
            work = open_loop(load, seconds, factor * rate, 2) if overload else closed_loop(load, seconds / 2)
            results, sizes = await with_memory(process, work)
            ended_s = began_s + (seconds if overload else seconds / 2)
            phases[name] = figures(results, heartbeat, began_s, ended_s)
            phases[name]["gateway_rss_mib"] = {
                "first": round(sizes[0], 1), "median": round(statistics.median(sizes), 1), "most": round(max(sizes), 1),
                "last": round(sizes[-1], 1),
            }  # fmt: skip
            if name == "capacity":
                rate = phases[name]["served"] / (time.perf_counter() - began_s)
                phases["capacity_requests_per_s"] = round(rate, 2)
    beating.cancel()
    capacity, overload = phases["capacity"], phases["overload"]
    return phases | {
        "generator_late_ms": heartbeat.percentiles(),
        "itl_p50_ratio": round(overload["itl_ms"]["p50"] / capacity["itl_ms"]["p50"], 3),
        "itl_p99_ratio": round(overload["itl_ms"]["p99"] / capacity["itl_ms"]["p99"], 3),
        "throughput_after_ratio": round(phases["after"]["output_tokens_per_s"] / capacity["output_tokens_per_s"], 3),
    }


def main() -> int:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; the other phases take half of it")
    parser.add_argument("--factor", type=float, default=10.0, help="offered load over capacity")
    args = parser.parse_args()
    with serving(args.model, args.stages, *FLAGS) as address:
        report = asyncio.run(measure(address, args.seconds, args.factor))
    about = {
        "model": Path(args.model).name, "stages": args.stages, "shape": [SHAPE.prompt_tokens, SHAPE.new_tokens],
        "streams": STREAMS, "queue": WAITING, "factor": args.factor, "seconds": args.seconds,
        **here(),
    }  # fmt: skip
    print(json.dumps(about | report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
