"""A second request with the same beginning: its time to first token against the first one's.

`python -m benchmarks.prefix --model FOLDER [--stages 1] [--prefix-tokens 1024]` starts a server of its own. Each repeat sends two
prompts, one after the other, that share a prefix nobody sent before and end differently. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys

from benchmarks.report import about, options
from benchmarks.servers import serving
from gateway.bench.load import Generator, Shape
from gateway.bench.measure import checked


async def measure(address: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds to the first token, first and second request of each repeat, after one that warms up."""
    shape = Shape(args.prefix_tokens + args.own_tokens, 1)
    runs = []
    async with Generator(address, seed=0) as load:
        for _ in range(args.repeats + 1):
            prefix = load.tokens(args.prefix_tokens)
            first, second = checked([await load.run(shape, prefix) for _ in range(2)])
            runs.append((first.ttft_s, second.ttft_s))
    return runs[1:]


def main() -> int:
    """Serve, measure, print."""
    parser = options(__doc__)
    parser.add_argument("--prefix-tokens", type=int, default=1024)
    parser.add_argument("--own-tokens", type=int, default=32, help="of each prompt after the prefix")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with serving(args.model, args.stages) as address:
        runs = asyncio.run(measure(address, args))
    report = {
        **about(f"time to first token of two prompts that share {args.prefix_tokens} tokens", args),
        "first_s": round(statistics.median(first for first, _ in runs), 4),
        "second_s": round(statistics.median(second for _, second in runs), 4),
        "ratio": round(statistics.median(second / first for first, second in runs), 3),
        "runs": runs,
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
