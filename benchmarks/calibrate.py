"""The planner's and the simulator's predictions against this machine: throughput, time to first token, KV capacity, memory.

    python -m benchmarks.calibrate --model DIR [--profile FILE] [--stages 1 2 4] [--streams 16] [--output json]

First a profile: one process with one thread computes steps of many sizes with a third, two thirds and all of the layers, alone and
beside copies of itself on the other cores, whose memory bandwidth they share, and beside twice as many, which empty each other's
caches; hops are timed between two processes, and what they cost the cores beside computing is taken from a server with a stage a core. With --profile it
is read from FILE, or measured and written there, in the format that `stageline plan` and `simulate` read. Then for each number of
stages `stageline serve` runs, each stage with one thread, and is measured through its gRPC door. The planner says what decodes, memory
and KV capacity should be, the simulator what a mixed load should: prompts and decodes of clients that send again. Nothing is fitted to the
runs that are compared. The gateway's costs are the simulator's defaults unless they are given. Exits 1 where a prediction is
further off than `--bound` (0.15).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.host_costs import host_costs
from benchmarks.report import here
from benchmarks.servers import serving
from gateway.bench.load import Generator, Shape
from gateway.bench.measure import checked, latency, throughput
from gateway.bench.transport import transport
from gateway.planner.catalogue import MIB, Gpu, read_profile
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.cost import Link, Workload, activation_bytes, weight_bytes
from gateway.planner.report import DTYPE_BYTES
from gateway.planner.split import split
from gateway.planner.types import ClusterPlan, Request
from gateway.scheduler import SchedulerLimits
from gateway.simulator import GatewayCost, Scenario, Traffic, simulate
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig
from stages.partition import LayerRange, kv_bytes_per_token, num_parameters

BLOCK = 16
ROWS = (1, 2, 4, 8, 16, 32)
CHUNKS = (64, 256, 512)
FAR = 512  # tokens before those of a step, where attention is timed
THROUGHPUT, DECODE, FIRST = Shape(128, 64), Shape(64, 128), Shape(512, 8)
KV_BYTES = 256 << 20
STREAMS = 16
NAME = "calibrated"  # of the device in a profile
_barrier: Any = None  # of the processes of a profile


def profile(model: str, dtype: str, copies: int, repeats: int) -> dict[str, Any]:
    """Seconds of steps, the median over `copies` processes at once: a mapping for `Measured`, `step_overhead_s`, and
    `process_bytes`, what a stage's process takes besides weights and cache."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(copies)
    with context.Pool(copies, initializer=_share, initargs=(barrier,)) as pool:
        found = pool.starmap(_time_steps, [(model, dtype, repeats)] * copies, chunksize=1)
    return {
        "layer_s": {size: statistics.median(one["layer_s"][size] for one in found) for size in found[0]["layer_s"]},
        "head_s": {size: statistics.median(one["head_s"][size] for one in found) for size in found[0]["head_s"]},
        **{
            name: statistics.median(one[name] for one in found)
            for name in ("kv_token_s", "attended_token_s", "step_overhead_s", "process_bytes")
        },
    }


def _share(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    os.environ["OMP_NUM_THREADS"] = "1"


def _time_steps(model: str, dtype: str, repeats: int) -> dict[str, Any]:
    import torch

    import gateway.serve_adapter  # what a stage's process imports, Ray included  # noqa: F401
    import stages.replica  # noqa: F401
    from stageline.stage.v1 import stage_service_pb2 as pb
    from stages.executor import StageExecutor
    from stages.runner import StageRunner
    from stages.server.frames import StepFrame
    from stages.weights import load_weights

    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    torch_dtype, dtype_bytes = getattr(torch, dtype), DTYPE_BYTES[dtype]
    third = config.num_layers // 3
    executors: dict[int, StageExecutor] = {}
    num_blocks = max(ROWS) * -(-(FAR + 1) // BLOCK) + max(CHUNKS) // BLOCK

    def load(end: int) -> None:
        runner = StageRunner(
            config, LayerRange(0, end), dtype=torch_dtype, device=torch.device("cpu"), block_size_tokens=BLOCK
        )
        load_weights(checkpoint, runner.layers, runner.model, dtype=torch_dtype)
        executors[end] = StageExecutor(runner)
        executors[end].allocate_kv(num_blocks)

    number = 0

    def step(rows: int, tokens: int, context: int) -> bytes:
        """`rows` sequences with `tokens` new ones each, `context` positions after them."""
        nonlocal number
        number += 1
        message = pb.Step(step_id=number, token_ids=np.full(rows * tokens, 7, dtype="<i4").tobytes())
        each = -(-context // BLOCK)
        for sequence in range(rows):
            row = message.rows.add(sequence_id=number * 100 + sequence + 1, num_tokens=tokens, context_len=context)
            row.block_table = np.arange(sequence * each, (sequence + 1) * each, dtype="<i4").tobytes()
            row.sampling.top_p = row.sampling.repetition_penalty = 1.0
        return message.SerializeToString()

    def once(end: int, rows: int, tokens: int, context: int) -> float:
        header = step(rows, tokens, context)
        began = time.thread_time()  # on a core, however many share it
        out = executors[end].execute(StepFrame(1, number, header), time.monotonic_ns())
        assert not out.failed, out.header
        return time.thread_time() - began

    def in_turn(shape: tuple[int, int, int]) -> list[dict[int, float]]:
        """Differences between executors are taken within a turn, so that a drift of the machine cancels."""
        turns = repeats if shape[1] > 1 else 4 * repeats  # decodes are short: their noise is large beside them
        return [{end: once(end, *shape) for end in executors} for _ in range(turns + 1)][1:]

    shapes = {**{rows: (rows, 1, 16) for rows in ROWS}, **{chunk: (1, chunk, chunk) for chunk in CHUNKS}}
    load(third)
    once(third, 1, max(CHUNKS), max(CHUNKS))
    held = num_parameters(config, LayerRange(0, third)) * dtype_bytes
    held += num_blocks * BLOCK * kv_bytes_per_token(config, LayerRange(0, third), dtype_bytes)
    process_bytes = anonymous_bytes(os.getpid()) - held
    load(2 * third)
    load(config.num_layers)
    _barrier.wait()
    turns = {size: in_turn(shape) for size, shape in shapes.items()}
    rows = max(ROWS)
    many, chunk = in_turn((rows, 1, FAR)), in_turn((1, CHUNKS[0], FAR + CHUNKS[0]))
    _barrier.wait()

    def layers_s(one: list[dict[int, float]]) -> float:
        return statistics.median((turn[2 * third] - turn[third]) / third for turn in one)

    per_layer = {size: layers_s(one) for size, one in turns.items()}
    kv_token_s = max(0.0, layers_s(many) - per_layer[rows]) / (rows * (FAR - 16))
    attended_s = max(0.0, layers_s(chunk) - per_layer[CHUNKS[0]]) / (CHUNKS[0] * FAR)

    def attention_s(size: int) -> float:
        attended = size * (size + 1) / 2 if size in CHUNKS else size * 16
        return attended_s * attended if size in CHUNKS else kv_token_s * attended

    overhead = statistics.median(max(0.0, turn[third] - third * per_layer[one]) for one in ROWS for turn in turns[one])
    head = {
        one: statistics.median(
            turn[config.num_layers] - overhead - config.num_layers * per_layer[one] for turn in turns[one]
        )
        for one in ROWS
    }
    return {
        # Noise may leave nothing, or less: at least half of what was timed, and a nanosecond.
        "layer_s": {size: max(1e-9, one / 2, one - attention_s(size)) for size, one in per_layer.items()},
        "head_s": {one: max(1e-9, seconds) for one, seconds in head.items()},
        "kv_token_s": kv_token_s,
        "attended_token_s": attended_s,
        "step_overhead_s": overhead,
        "process_bytes": process_bytes,
    }


def anonymous_bytes(pid: int) -> int:
    """Memory in RAM that is a process's own: neither mapped files (weights on disk, libraries) nor shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def device(model: str, dtype: str, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """This machine as a device of a profile file (`gateway/planner/catalogue.py` reads it)."""
    cores = os.cpu_count() or 1
    say("profile of one process")
    alone = profile(model, dtype, 1, repeats)
    say(f"profile of {cores} processes at once")
    busy = profile(model, dtype, cores, repeats)
    say(f"profile of {2 * cores} processes at once")
    crowded = profile(model, dtype, 2 * cores, repeats)
    say(f"what {cores} stages take beside computing")
    with serving(model, cores, *_flags(dtype)) as address:
        costs = asyncio.run(host_costs(address, STREAMS, seconds=10.0))
    say("hops")
    link = link_of(repeats)

    def tables(found: dict[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in ("layer_s", "head_s", "kv_token_s", "attended_token_s")}

    return {
        "source": f"benchmarks/calibrate.py, {Path(model).name}, {dtype}; hop {1e3 * link.latency_s:.3f} ms + "
        f"{link.bytes_per_s / 1e9:.2f} GB/s",
        # Nothing is computed from these two, since times are measured.
        "memory_gb_per_s": 1.0,
        "bf16_tflops": 1.0,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB,
        "reserve_mib": alone["process_bytes"] / MIB,
        "step_overhead_s": alone["step_overhead_s"],
        "measured": tables(alone),
        "host": {"cores": cores, "busy": tables(busy), "crowded": tables(crowded), **costs},
    }


@dataclass(frozen=True)
class Setup:
    """What all predictions share. `gpu` is this machine as `device` found it."""

    model: str
    config: ModelConfig
    dtype: str
    gpu: Gpu
    link: Link
    cost: GatewayCost

    def plan(self, count: int, workload: Workload) -> tuple[Request, ClusterPlan]:
        """`serve --stages count --kv-cache.memory-bytes KV_BYTES`, as the planner sees it: each stage in a share of memory
        that leaves KV_BYTES for the cache."""
        ranges, size = split(self.config, count), DTYPE_BYTES[self.dtype]
        devices = tuple(
            replace(
                self.gpu,
                name=f"{self.gpu.name}-{index}",
                memory_bytes=KV_BYTES
                + weight_bytes(self.config, layers, self.gpu, size)
                + self.gpu.reserve_bytes
                + activation_bytes(self.config, workload, size, last=layers.is_last(self.config)),
            )
            for index, layers in enumerate(ranges)
        )
        request = Request(
            model=self.model, config=self.config, gpus=devices, dtype=self.dtype, layers=",".join(map(str, ranges)),
            link=self.link, workload=workload, usable_fraction=1.0, block_size_tokens=BLOCK,
        )  # fmt: skip
        plan = make_cluster_plan(request)
        assert plan.layers() == request.layers
        return request, plan

    def predict(self, count: int, streams: int) -> dict[str, Any]:
        """Figures of `measure`."""
        context = DECODE.prompt_tokens + DECODE.new_tokens // 2
        request, plan = self.plan(count, Workload(context_tokens=context, sequences=streams))
        assert plan.performance is not None
        assert plan.performance.sequences == streams, "KV_BYTES holds all streams"

        def run(streams: int, shape: Shape) -> Any:
            traffic = Traffic(
                streams=streams, prompt_tokens=shape.prompt_tokens, output_tokens=shape.new_tokens, sigma=0
            )
            return simulate(
                Scenario(
                    request=request, plan=plan, traffic=traffic, gateway_cost=self.cost, duration_s=90.0, warmup_s=10.0,
                    limits=SchedulerLimits(prefix_caching=False),
                )
            )  # fmt: skip

        return {
            "decode_tokens_per_s": plan.performance.tokens_per_s,
            "output_tokens_per_s": run(streams, THROUGHPUT).output_tokens_per_s,
            "ttft_ms": 1000 * run(1, FIRST).ttft_s["p50"],
            "kv_tokens": plan.kv_capacity_tokens,
            # With the activations: allocators keep what they had at the peak.
            "memory_mib": sum(stage.memory.used_bytes for stage in plan.stages) / MIB,
        }


async def measure(address: str, streams: int, repeats: int, rounds: int) -> dict[str, Any]:
    """The same figures of a running server. Memory is that of all stages' processes at the end."""
    async with Generator(address, 0) as load:
        decode = await throughput(load, DECODE, streams, repeats)
        outcomes = checked(await load.closed_loop([THROUGHPUT] * (rounds * streams), streams))
        # While all streams are at it: neither the first round, which begins with prompts alone, nor the last.
        ends = sorted(one.token_s[-1] for one in outcomes)
        began, ended = ends[streams - 1], ends[-streams - 1]
        tokens = sum(began < at <= ended for one in outcomes for at in one.token_s)
        first = await latency(load, FIRST, max(5, repeats))
        [pipeline] = load.model.pipelines
        pids = {replica.pid for stage in pipeline.stages for replica in stage.replicas}
        return {
            "decode_tokens_per_s": decode["decode_tokens_per_s"],
            "output_tokens_per_s": tokens / (ended - began),
            "ttft_ms": first["ttft_ms"],
            "kv_tokens": pipeline.num_blocks * BLOCK,
            "memory_mib": sum(map(anonymous_bytes, pids)) / MIB,
        }


def link_of(repeats: int) -> Link:
    """Hops between two processes of this host: half a round trip of a small message, and the rate of large ones, through
    what stages of one host use."""

    def seconds(num_bytes: int) -> float:
        figures = asyncio.run(transport(num_bytes, repeats))
        return num_bytes / float(figures["gigabytes_per_s"]["shared"]) / 1e9

    small_bytes, large_bytes = 64 << 10, 8 << 20
    small_s, large_s = seconds(small_bytes), seconds(large_bytes)
    rate = (large_bytes - small_bytes) / max(1e-9, large_s - small_s)
    return Link(latency_s=small_s / 2, bytes_per_s=rate, software_bytes_per_s=rate)


def _flags(dtype: str) -> tuple[str, ...]:
    """Of `stageline serve`."""
    return (
        "--dtype", dtype, "--stages.num-threads", "1", "--kv-cache.memory-bytes", str(KV_BYTES),
        "--kv-cache.prefix-caching", "false",
    )  # fmt: skip


def table(rows: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown."""
    lines = ["| stages | figure | predicted | measured | off by |", "|---|---|---|---|---|"]
    for count, figures in rows.items():
        for name, one in figures.items():
            lines.append(
                f"| {count} | {name} | {one['predicted']:,.1f} | {one['measured']:,.1f} | {100 * one['error']:+.1f} % |"
            )
    return "\n".join(lines)


def calibrate(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Profile, predict, run, compare."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.profile or Path(folder) / "profile.yaml")
        if not file.exists():
            found = device(args.model, args.dtype, args.repeats, say)
            file.write_text(yaml.safe_dump({"gpus": {NAME: found}}, sort_keys=False))
        gpu = read_profile(str(file))[NAME]
    say("hops")
    setup = Setup(
        model=args.model, config=open_checkpoint(args.model).config, dtype=args.dtype, gpu=gpu, link=link_of(args.repeats),
        cost=replace(GatewayCost(), step_s=args.gateway_step_us / 1e6, row_s=args.gateway_row_us / 1e6),
    )  # fmt: skip
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for count in args.stages:
        say(f"{count} stages")
        predicted = setup.predict(count, args.streams)
        with serving(args.model, count, *_flags(args.dtype)) as address:
            measured = asyncio.run(measure(address, args.streams, args.repeats, args.rounds))
        rows[count] = {
            name: {
                "predicted": predicted[name],
                "measured": measured[name],
                "error": predicted[name] / measured[name] - 1,
            }
            for name in measured
        }
    worst = max((abs(one["error"]) for figures in rows.values() for one in figures.values()), default=0.0)
    return {
        "model": Path(args.model).name, "dtype": args.dtype, "streams": args.streams, "bound": args.bound, "worst": worst,
        **here(), "device": asdict(gpu), "hop_s": setup.link.latency_s, "hop_bytes_per_s": setup.link.bytes_per_s,
        "stages": rows,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", metavar="FILE", help="read it from there; measured and written if there is none")
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES), default="float32")
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 4], help="none: the profile alone")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="requests of each stream in a throughput run")
    parser.add_argument("--gateway-step-us", type=float, default=1e6 * GatewayCost().step_s)
    parser.add_argument("--gateway-row-us", type=float, default=1e6 * GatewayCost().row_s)
    parser.add_argument("--bound", type=float, default=0.15)
    parser.add_argument("--output", choices=["table", "json"], default="table")
    args = parser.parse_args()
    report = calibrate(args, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(report, indent=2) if args.output == "json" else table(report["stages"]))
    print(f"worst: {100 * report['worst']:.1f} %, bound {100 * args.bound:.0f} %", file=sys.stderr)
    return 0 if report["worst"] <= args.bound else 1


if __name__ == "__main__":
    sys.exit(main())
