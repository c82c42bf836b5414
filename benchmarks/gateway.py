"""The gateway alone: gRPC streams through the real engine, over a stage that answers every step at once.

`python -m benchmarks.gateway --tokenizer FOLDER`. The gateway runs on one core, the stage and the load on the others.
Prints, for each number of streams, the tokens a second and the gateway's CPU time a token, then (from one more run, under
cProfile, which itself slows it) how that time divides over the parts of the code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.report import here
from gateway.api.grpc.server import serve_grpc
from gateway.api.service import Frontend
from gateway.bench.load import Generator, Shape
from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, record_at
from gateway.tokenizer import load_tokenizer
from gateway.types import ModelInfo
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.partition import LayerRange
from stages.server.frames import StepFrame
from stages.server.server import StageServer

SHAPE = Shape(prompt_tokens=128, new_tokens=128)
NUM_BLOCKS = 100_000
PARTS = ("gateway/scheduler", "gateway/sampling", "gateway/tokenizer", "gateway/engine", "gateway/pipelines",
         "gateway/api", "stageline/", "grpc", "google/protobuf", "asyncio", "numpy")  # fmt: skip


class NullExecutor:
    """A whole model in one stage that chooses a token from a row's place and costs nothing."""

    element_type = pb.ELEMENT_TYPE_FLOAT32
    hidden_states = SimpleNamespace(element_type=pb.ELEMENT_TYPE_FLOAT32)

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.runner = SimpleNamespace(
            config=SimpleNamespace(num_layers=1, hidden_size=8, vocab_size=vocab_size), layers=LayerRange(0, 1),
            block_size_tokens=16, attention_report="null", num_blocks=0, dtype=torch.float32, quantization=None,
            model=SimpleNamespace(is_first=True, is_last=True, batch_invariant=False),
        )  # fmt: skip

    def allocate_kv(self, num_blocks: int) -> None:
        """See StageExecutor."""
        self.runner.num_blocks = num_blocks

    def max_payload_bytes(self) -> int:
        """See StageExecutor."""
        return 0

    def reset(self) -> None:
        """See StageExecutor."""

    def execute(self, frame: StepFrame, received_ns: int) -> StepFrame:
        """One sure candidate for every row that wants a token."""
        step = pb.Step.FromString(frame.header)
        result = pb.StepResult(step_id=step.step_id)
        logit = np.array([10.0], "<f4").tobytes()
        for row in step.rows:
            if row.HasField("sampling"):
                token = (row.context_len * 7919 + row.sequence_id * 31) % self._vocab_size
                result.rows.add(
                    sequence_id=row.sequence_id, raw_logsumexp=11.0, processed_logsumexp=11.0, candidate_logits=logit,
                    candidate_raw_logits=logit, candidate_ids=np.array([token], "<i4").tobytes(),
                )  # fmt: skip
        return StepFrame(frame.epoch, frame.step_id, result.SerializeToString())


async def run_stage(vocab_size: int) -> None:
    """Print the port, serve until killed."""
    server = StageServer(NullExecutor(vocab_size), fingerprint="null", kv_capacity_blocks=NUM_BLOCKS)  # type: ignore[arg-type]
    print(await server.start("127.0.0.1", 0), flush=True)
    await asyncio.Event().wait()


async def run_gateway(tokenizer_folder: str, stage_port: int) -> None:
    """Print the port; SIGUSR1: print the CPU seconds so far; SIGUSR2: begin to profile, then print parts and end."""
    tokenizer = load_tokenizer(Path(tokenizer_folder))
    model = ModelInfo(name="null", fingerprint="null", max_context_tokens=8192, vocab_size=tokenizer.vocab_size)
    registry = Registry()
    engine = Engine(model=model, tokenizer=tokenizer, registry=registry, settings=EngineSettings(), fingerprint="null")
    await engine.start()
    registry.set_replicas("null", [await record_at(f"127.0.0.1:{stage_port}")])
    await engine.wait_ready()
    server = await serve_grpc(Frontend(engine, tokenizer, None, model), "127.0.0.1", 0)
    loop, ended, profile = asyncio.get_running_loop(), asyncio.Event(), cProfile.Profile()
    profiling = False

    def on_profile() -> None:
        nonlocal profiling
        if profiling:
            profile.disable()
            print(json.dumps(parts_of(profile)), flush=True)
            ended.set()
        else:
            profiling = True
            profile.enable()

    loop.add_signal_handler(signal.SIGUSR1, lambda: print(time.process_time(), flush=True))
    loop.add_signal_handler(signal.SIGUSR2, on_profile)
    print(server.port, flush=True)
    await ended.wait()


def parts_of(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds in each part of the code; what is called from C, such as protobuf's methods, counts for itself."""
    seconds: Counter[str] = Counter()
    for (file, _, name), (_, _, own_s, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file == "~":
            part = "waiting" if "poll" in name else "built in"
        else:
            part = next((part for part in PARTS if part in file), "other")
        seconds[part] += own_s
    return dict(seconds.most_common())


@contextlib.contextmanager
def child(core: int | None, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """This script in a role of its own, and the port it prints."""
    command = [sys.executable, "-m", "benchmarks.gateway", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    try:
        yield process, int(read_line(process))
    finally:
        process.kill()
        process.wait()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process of the benchmark ended with exit code {process.wait()}")
    return line


def measure(gateway: subprocess.Popen[str], port: int, streams: int) -> tuple[float, float]:
    """(tokens a second, CPU seconds of the gateway a token) of one closed round of requests."""

    def cpu_s() -> float:
        gateway.send_signal(signal.SIGUSR1)
        return float(read_line(gateway))

    async def load() -> None:
        async with Generator(f"127.0.0.1:{port}", seed=streams) as generator:
            for outcome in await generator.closed_loop([SHAPE] * streams, streams):
                assert len(outcome.token_s) == SHAPE.new_tokens, outcome.error

    before_s, began_s = cpu_s(), time.perf_counter()
    asyncio.run(load())
    tokens = streams * SHAPE.new_tokens
    return tokens / (time.perf_counter() - began_s), (cpu_s() - before_s) / tokens


def main() -> int:
    """Measure and print; or play a role for another process of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a model's tokenizer")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--role", choices=("stage", "gateway"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "stage":
        asyncio.run(run_stage(load_tokenizer(Path(args.tokenizer)).vocab_size))
        return 0
    if args.role == "gateway":
        asyncio.run(run_gateway(args.tokenizer, args.port))
        return 0
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[1:]))
    with (
        child(None, "--tokenizer", args.tokenizer, "--role", "stage") as (_, stage_port),
        child(cores[0], "--tokenizer", args.tokenizer, "--role", "gateway", "--port", str(stage_port)) as (
            gateway,
            port,
        ),
    ):
        measure(gateway, port, 16)  # warm
        runs = {streams: [measure(gateway, port, streams) for _ in range(args.repeats)] for streams in args.streams}
        gateway.send_signal(signal.SIGUSR2)
        measure(gateway, port, args.streams[-1])
        gateway.send_signal(signal.SIGUSR2)
        parts_s = json.loads(read_line(gateway))
    profiled = args.streams[-1] * SHAPE.new_tokens
    report = {
        "what": "gateway over a stage that answers at once",
        "shape": [SHAPE.prompt_tokens, SHAPE.new_tokens],
        **here(),
        "streams": {
            streams: {
                "tokens_per_s": round(statistics.median(rate for rate, _ in of)),
                "gateway_cpu_us_per_token": round(1e6 * statistics.median(cost for _, cost in of), 1),
                "tokens_per_gateway_cpu_s": round(1 / statistics.median(cost for _, cost in of)),
            }
            for streams, of in runs.items()
        },
        "profiled_us_per_token": {
            part: round(1e6 * s / profiled, 1) for part, s in parts_s.items() if part != "waiting"
        },
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
