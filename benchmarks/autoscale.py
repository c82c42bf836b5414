"""Pipelines 1 → 2 → 1 under load, on this host: `make autoscale`. Prints one JSON object; fails if a request failed.

Two streams hold one pipeline busy; more streams than one pipeline is wanted for come and go. Seconds are counted from the
moment the load changes until as many pipelines answer as it asks for, the configured delays included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING

import grpc.aio

from benchmarks.report import here
from benchmarks.servers import serving
from gateway.bench.load import Generator, Outcome, Shape
from gateway.demo import fetch_model
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:  # in the type stubs only
    from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

TARGET_SEQUENCES, UP_DELAY_S, IDLE_S = 4, 1.0, 5.0
TIMEOUT_S = 240.0


async def ready_pipelines(stub: InferenceServiceAsyncStub) -> int:
    answer = await stub.GetModel(pb.GetModelRequest(), timeout=10)
    return sum(pipeline.state == "ready" for pipeline in answer.pipelines)


async def until(stub: InferenceServiceAsyncStub, count: int) -> float:
    """Seconds until there are exactly so many pipelines."""
    began = time.perf_counter()
    while await ready_pipelines(stub) != count:
        if time.perf_counter() - began > TIMEOUT_S:
            raise SystemExit(f"there were not {count} pipelines within {TIMEOUT_S:g} s")
        await asyncio.sleep(0.1)
    return round(time.perf_counter() - began, 2)


async def measure(address: str) -> dict[str, object]:
    outcomes: list[Outcome] = []

    async def stream(load: Generator, stop: asyncio.Event) -> None:
        while not stop.is_set():
            outcomes.append(await load.run(Shape(64, 64)))

    async with grpc.aio.insecure_channel(address) as channel, Generator(address, 0) as load:
        stub = InferenceServiceStub(channel)
        assert await ready_pipelines(stub) == 1
        always, burst = asyncio.Event(), asyncio.Event()
        few = [asyncio.create_task(stream(load, always)) for _ in range(2)]
        await asyncio.sleep(5)
        assert await ready_pipelines(stub) == 1, "two streams are not worth a second pipeline"
        many = [asyncio.create_task(stream(load, burst)) for _ in range(2 * TARGET_SEQUENCES - 2)]
        up_s = await until(stub, 2)
        await asyncio.sleep(5)
        burst.set()
        down_s = await until(stub, 1)
        await asyncio.sleep(5)
        always.set()
        await asyncio.gather(*few, *many)
    failed = [one.error or "short" for one in outcomes if one.error or len(one.token_s) != one.shape.new_tokens]
    pause_s = max(gap for one in outcomes for gap in one.gaps_s)
    return {
        "requests": len(outcomes), "failed": len(failed), "errors": sorted(set(failed)), "seconds_1_to_2": up_s,
        "seconds_2_to_1": down_s, "longest_pause_s": round(pause_s, 2), "scale_up_delay_s": UP_DELAY_S, "idle_s": IDLE_S,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the demo's SmolLM2-135M")
    parser.add_argument("--stages", type=int, default=2)
    args = parser.parse_args()
    flags = (
        "--pipelines.max", "2", "--pipelines.min", "1", "--pipelines.target-sequences", str(TARGET_SEQUENCES),
        "--pipelines.scale-up-delay-s", str(UP_DELAY_S), "--pipelines.idle-s", str(IDLE_S),
        "--stages.num-threads", "1", "--kv-cache.memory-bytes", str(256 << 20),
    )  # fmt: skip
    with serving(args.model or str(fetch_model()), args.stages, *flags) as address:
        report = asyncio.run(measure(address))
    print(json.dumps(report | {"stages": args.stages, **here()}, indent=2))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
