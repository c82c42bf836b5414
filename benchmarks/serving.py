"""A conversation-like mix of lengths with Poisson arrivals against a server of its own: `stageline bench serving` at several rates.

`python -m benchmarks.serving --model FOLDER [--stages 1] [--rates 0.5 1 2] [--requests 40]` prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from benchmarks.report import about, options
from benchmarks.servers import serving as server
from gateway.bench.load import Generator, Shape
from gateway.bench.measure import serving, throughput


async def measure(address: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures at each rate, after one burst that warms up; every rate has the same lengths."""
    runs: list[dict[str, Any]] = []
    for rate in args.rates:
        async with Generator(address, seed=args.seed) as load:
            if not runs:
                await throughput(load, Shape(args.prompt_tokens // 4, 8), streams=4, repeats=1)
            shapes = load.conversation(args.requests, args.prompt_tokens, args.new_tokens)
            runs.append(await serving(load, shapes, rate))
    return runs


def main() -> int:
    """Serve, measure, print."""
    parser = options(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="requests a second")
    parser.add_argument("--requests", type=int, default=40, help="at each rate")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="of the longest answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with server(args.model, args.stages) as address:
        runs = asyncio.run(measure(address, args))
    print("| requests/s | tokens/s | TTFT p50, p99, ms | between tokens p50, p99, ms | failed |\n|---|---|---|---|---|")
    for run in runs:
        ttft, itl = run["ttft_ms"], run["itl_ms"]
        print(
            f"| {run['offered_requests_per_s']} | {run['output_tokens_per_s']} | {ttft['p50']}, {ttft['p99']} "
            f"| {itl['p50']}, {itl['p99']} | {run['failed']} |"
        )
    report = {
        **about("conversation-like lengths (log-normal), Poisson arrivals", args),
        "longest": [args.prompt_tokens, args.new_tokens],
        "rates": runs,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
