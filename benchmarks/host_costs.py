"""What stages that share a host's cores take of them beside computing, for benchmarks/calibrate.py."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable

import grpc.aio
import psutil

from benchmarks.servers import GATEWAY
from gateway.bench.load import Generator, Shape
from stageline.operations.v1 import operations_service_pb2 as pb
from stageline.operations.v1 import operations_service_pb2_grpc as pb_grpc

LONG = Shape(64, 4096)
BEGIN_S = 6.0  # for prompts, before anything is counted


async def host_costs(address: str, streams: int, seconds: float) -> dict[str, float]:
    """Of a server that this process started, while so many streams decode: `hop_core_s`, CPU seconds of a stage's process for a
    step beside its compute thread, and `background_cores`, what all other processes take (Ray, this one), less the gateway."""
    async with Generator(address, 0) as load:
        [pipeline] = load.model.pipelines
        stages = [replica.pid for stage in pipeline.stages for replica in stage.replicas]
        decoding = asyncio.create_task(load.closed_loop([LONG] * streams, streams))
        try:
            await asyncio.sleep(BEGIN_S)
            before, began_s = _cpu_seconds(stages), time.monotonic()
            num_steps = await _count_steps(address, seconds)
            after, took_s = _cpu_seconds(stages), time.monotonic() - began_s
        finally:
            decoding.cancel()
            await asyncio.gather(decoding, return_exceptions=True)
    spent = {process: _less(after[process], before.get(process, {})) for process in after}
    beside_s = sum(sum(threads) - max(threads, default=0.0) for pid, threads in spent.items() if pid in stages)
    others_s = sum(sum(threads) for pid, threads in spent.items() if pid not in stages)
    return {"hop_core_s": beside_s / max(1, num_steps * len(stages)), "background_cores": others_s / took_s}


def _less(after: dict[int, float], before: dict[int, float]) -> list[float]:
    return [seconds - before.get(thread, 0.0) for thread, seconds in after.items()]


def _cpu_seconds(stages: Iterable[int]) -> dict[int, dict[int, float]]:
    """CPU seconds so far of this process and what it started, the gateway left out: by process and thread, the threads of all
    but stages taken together."""
    found = {os.getpid(): {0: time.process_time()}}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid in stages:
                found[process.pid] = {one.id: one.user_time + one.system_time for one in process.threads()}
            elif process.cmdline()[:1] != [GATEWAY]:
                times = process.cpu_times()
                found[process.pid] = {0: times.user + times.system}
        except psutil.NoSuchProcess:
            continue
    return found


async def _count_steps(address: str, seconds: float) -> int:
    num_steps = 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.OperationsServiceStub(channel)
        try:
            async for group in stub.StreamSteps(pb.StreamStepsRequest(), timeout=seconds):
                num_steps += len(group.steps) + group.num_dropped
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:  # the end we asked for
                raise
    return num_steps
