"""What being ready for failures costs while nothing fails: throughput of 16 decoding streams, as it is and switched off.

    python -m benchmarks.recovery_cost --model DIR [--stages 2] [--pairs 5]

Takes turns, each with processes of its own: stages and a gateway without Ray (Serve's health checks are in neither), first a
turn that is not counted. In a pair the order changes from one pair to the next, so that a drift of the machine adds to both.
Prints one JSON object: the rates, CPU time a token of all these processes, their medians, and the ratios of the two.
What is off is in recovery_parts.py, and in the report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil

from benchmarks.recovery_parts import SWITCHED_OFF
from benchmarks.report import about, options
from gateway.bench.load import Generator, Shape
from gateway.bench.measure import throughput
from gateway.planner.split import resolve_layers
from stages.checkpoint import open_checkpoint

STREAMS = 16
WARM = Shape(16, 8)
TARGET = 0.03


class Part:
    """A process of recovery_parts, while the block lasts."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    def __enter__(self) -> Part:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.recovery_parts", *self._arguments], stdout=subprocess.PIPE, text=True
        )
        self.process = psutil.Process(self._process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        # The second SIGTERM ends a stage that still waits for its gateway to let go.
        for _attempt in range(2):
            self._process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        self._process.wait(timeout=60)

    def address(self) -> str:
        """Where it listens, once it does."""
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        if words[:1] != ["ready"]:
            raise SystemExit(f"{' '.join(self._arguments)} did not come up")
        return words[1].removeprefix("grpc://")


async def rate(address: str, processes: list[psutil.Process], shape: Shape) -> tuple[float, float]:
    """Tokens a second while all streams decode, and CPU milliseconds a token of the whole run."""

    def cpu_s() -> float:
        return float(sum(times.user + times.system for times in (process.cpu_times() for process in processes)))

    async with Generator(address, seed=time.monotonic_ns()) as load:
        await load.closed_loop([WARM] * STREAMS, STREAMS)
        before_s = cpu_s()
        found = await throughput(load, shape, STREAMS, 1, warm=False)
        spent_s = cpu_s() - before_s
    if found["decode_tokens_per_s"] is None:
        raise SystemExit("the streams did not decode at the same time: nothing was measured")
    return float(found["decode_tokens_per_s"]), 1000 * spent_s / (STREAMS * shape.new_tokens)


def turn(args: argparse.Namespace, switch: str) -> tuple[float, float]:
    """Start everything, measure, end everything."""
    threads = max(1, (os.cpu_count() or 1) // args.stages)
    ranges = resolve_layers(open_checkpoint(args.model).config, args.stages, None)
    with ExitStack() as stack:
        stages = [
            stack.enter_context(
                Part(
                    "stage", switch, "--model", args.model, "--layers", str(layers), "--port", "0", "--dtype", args.dtype,
                    "--num-threads", str(threads), "--kv-memory-bytes", str(256 << 20),
                )
            )
            for layers in ranges
        ]  # fmt: skip
        addresses = [stage.address() for stage in stages]
        gateway = stack.enter_context(Part("gateway", switch, args.model, *addresses))
        processes = [part.process for part in (gateway, *stages)]
        return asyncio.run(rate(gateway.address(), processes, Shape(16, args.new_tokens)))


def main() -> int:
    """Measure and print; exit code 1 where the cost is above the target."""
    parser = options(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96, help="of each of the 16 streams")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.set_defaults(stages=2)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the `with` blocks, which end the processes
    began_s = time.monotonic()
    turn(args, "on")  # warms the page cache
    runs: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
    for number in range(args.pairs):
        for switch in ("on", "off") if number % 2 == 0 else ("off", "on"):
            runs[switch].append(turn(args, switch))
            print(f"{switch}: {runs[switch][-1][0]} tokens/s", file=sys.stderr, flush=True)
    rates = {switch: [one[0] for one in found] for switch, found in runs.items()}
    cpu_ms = {switch: [round(one[1], 3) for one in found] for switch, found in runs.items()}
    median = {switch: statistics.median(found) for switch, found in rates.items()}
    median_cpu = {switch: statistics.median(found) for switch, found in cpu_ms.items()}
    cost = 1 - median["on"] / median["off"]
    pairs = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    report = {
        **about(f"readiness for failures: decode of {STREAMS} streams, as it is (on) and switched off (off)", args),
        "dtype": args.dtype,
        "shape": [16, args.new_tokens],
        "off": SWITCHED_OFF,
        "tokens_per_s": rates,
        "median_tokens_per_s": median,
        "cost": round(cost, 4),
        "median_of_pairs": round(1 - statistics.median(pairs), 4),
        "cpu_ms_per_token": cpu_ms,
        "median_cpu_ms_per_token": median_cpu,
        "cpu_cost": round(median_cpu["on"] / median_cpu["off"] - 1, 4),
        "target": TARGET,
        "seconds": round(time.monotonic() - began_s),
    }
    print(json.dumps(report, indent=2))
    return int(cost > TARGET)


if __name__ == "__main__":
    sys.exit(main())
