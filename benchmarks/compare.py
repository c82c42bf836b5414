"""Decode throughput of Stageline (1 and 2 stages), transformers and, where its Python is given, vLLM: taken in turn, on the
same weights and prompts. Prints a table and one JSON object.

    python -m benchmarks.compare --model DIR [--vllm-python /path/to/python] [--repeats 5]

bfloat16, 128-token prompts, 64 new tokens, greedy; tokens a second of all streams while all of them decode. The limit of one
stream is what reading the weights once a token allows: the best read-only sum over 2 GB, divided by their bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from gateway.bench.load import Generator, Shape
from gateway.bench.measure import throughput

SHAPE = Shape(prompt_tokens=128, new_tokens=64)
STREAMS = (1, 16)


class Contender(Protocol):
    """Something that decodes."""

    def decode_rate(self, streams: int) -> float:
        """Tokens a second of all streams together."""
        ...


class Stageline:
    """A running `stageline serve`, through its gRPC door."""

    def __init__(self, address: str) -> None:
        self._address = address

    def decode_rate(self, streams: int) -> float:
        """See Contender."""

        async def measure() -> float:
            async with Generator(self._address, seed=time.monotonic_ns()) as load:
                return float((await throughput(load, SHAPE, streams, 1, warm=False))["decode_tokens_per_s"])

        return asyncio.run(measure())


class Worker:
    """Another system in a process of its own: reads a number of streams, answers tokens a second."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def decode_rate(self, streams: int) -> float:
        """See Contender."""
        assert self._process.stdin is not None
        print(streams, file=self._process.stdin, flush=True)
        return float(read_marked(self._process))


def read_marked(process: subprocess.Popen[str]) -> str:
    """The next line that is for us: other systems print what they like on stdout."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("@@ "):
            return line[3:].strip()
    raise SystemExit(f"a worker ended with exit code {process.wait()}")


@contextmanager
def serving(model: str, stages: int) -> Iterator[Contender]:
    """Our own server."""
    command = [sys.executable, "-m", "gateway.cli", "serve", "--model", model, "--stages", str(stages),
               "--grpc-port", "0", "--http-port", "0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        if len(ready) != 3:
            raise SystemExit(process.wait() or 1)
        yield Stageline(ready[2].removeprefix("grpc://"))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


@contextmanager
def working(python: str, script: str, model: str) -> Iterator[Contender]:
    """A worker script of this folder under the given Python."""
    command = [python, str(Path(__file__).parent / script), model, str(SHAPE.prompt_tokens), str(SHAPE.new_tokens)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        read_marked(process)  # loaded
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


def streaming_bandwidth() -> float:
    """Bytes a second of the best of five read-only sums over 2 GB, on all cores."""
    from concurrent.futures import ThreadPoolExecutor

    data = np.ones(1 << 28, dtype=np.float64)
    parts = np.array_split(data, os.cpu_count() or 1)
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


def main() -> int:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--vllm-python", help="a Python that has vLLM for CPUs; without it vLLM is left out")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    bandwidth = streaming_bandwidth()
    rates: dict[str, dict[int, list[float]]] = {}
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {
            "stageline, 1 stage": stack.enter_context(serving(args.model, 1)),
            "stageline, 2 stages": stack.enter_context(serving(args.model, 2)),
            "transformers": stack.enter_context(working(sys.executable, "worker_transformers.py", args.model)),
        }
        if args.vllm_python:
            contenders["vllm"] = stack.enter_context(working(args.vllm_python, "worker_vllm.py", args.model))
        rates = {name: {streams: [] for streams in STREAMS} for name in contenders}
        for turn in range(args.repeats + 1):
            for streams in STREAMS:
                for name, contender in contenders.items():
                    rate = contender.decode_rate(streams)
                    if turn:  # the first turn warms up
                        rates[name][streams].append(rate)
    weights = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    medians = {name: {n: statistics.median(runs) for n, runs in by.items()} for name, by in rates.items()}
    print(f"{'':24}" + "".join(f"{n:>12} streams" for n in STREAMS))
    for name, by in medians.items():
        print(f"{name:24}" + "".join(f"{by[n]:>14.1f} tok/s" for n in STREAMS))
    print(f"{'limit, one stream':24}{bandwidth / weights:>14.1f} tok/s  ({bandwidth / 1e9:.1f} GB/s)")
    ours = medians["stageline, 1 stage"]
    report = {
        "model": Path(args.model).name,
        "shape": [SHAPE.prompt_tokens, SHAPE.new_tokens],
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "commit": commit.stdout.strip(),
        "median_tokens_per_s": medians,
        "ratio_of_one_stage": {
            name: {n: round(ours[n] / by[n], 2) for n in STREAMS}
            for name, by in medians.items()
            if "stageline" not in name
        },
        "share_of_limit": round(ours[1] * weights / bandwidth, 2),
        "runs": rates,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
