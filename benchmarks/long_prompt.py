"""A long prompt arrives while others stream: how much longer they wait between tokens, and it for its first.

`python -m benchmarks.long_prompt --model FOLDER [--stages 2] [--streams 8]` starts a server of its own. Each repeat takes
the prompt's time to first token alone, then again while `--streams` requests decode. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time

from benchmarks.report import about, options
from benchmarks.servers import serving
from gateway.bench.load import Generator, Outcome, Shape

BEFORE_S = 4.0  # how long the streams are watched before the prompt arrives


async def repeat(load: Generator, prompt: Shape, streams: int, prompt_tokens: int) -> dict[str, float]:
    """One arrival, in seconds: the streams' time between tokens before and meanwhile, the prompt's to its first token."""
    alone = await load.run(prompt)
    background = Shape(prompt_tokens, 8192 - prompt_tokens)
    outcomes = [Outcome(background, time.perf_counter()) for _ in range(streams)]
    tasks = [asyncio.create_task(load.run_into(outcome)) for outcome in outcomes]
    while min(len(outcome.token_s) for outcome in outcomes) < 8:
        if failed := next((outcome.error for outcome in outcomes if outcome.error), ""):
            raise SystemExit(f"a stream failed: {failed}")
        await asyncio.sleep(0.05)
    await asyncio.sleep(BEFORE_S)
    began_s = time.perf_counter()
    beside = await load.run(prompt)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    def gaps(start_s: float, end_s: float) -> list[float]:
        return sorted(
            later - earlier
            for outcome in outcomes
            for earlier, later in zip(outcome.token_s, outcome.token_s[1:], strict=False)
            if later > start_s and earlier < end_s
        )

    before, meanwhile = gaps(began_s - BEFORE_S, began_s), gaps(began_s, beside.token_s[0])
    return {
        "ttft_alone_s": alone.ttft_s,
        "ttft_beside_s": beside.ttft_s,
        "itl_before_p50_s": statistics.median(before),
        "itl_before_p99_s": before[int(0.99 * len(before))],
        "itl_meanwhile_p50_s": statistics.median(meanwhile),
        "itl_meanwhile_p99_s": meanwhile[int(0.99 * len(meanwhile))],
    }


async def measure(address: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """All repeats, after one that warms up."""
    prompt = Shape(args.long_tokens, 1)
    async with Generator(address, seed=0) as load:
        runs = [await repeat(load, prompt, args.streams, 128) for _ in range(args.repeats + 1)]
    return runs[1:]


def main() -> int:
    """Serve, measure, print."""
    parser = options(__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--long-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with serving(args.model, args.stages) as address:
        runs = asyncio.run(measure(address, args))
    middle = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    report = {
        **about(f"{args.long_tokens} prompt tokens arrive beside {args.streams} streams", args),
        **middle,
        "itl_p99_over_p50_before": round(
            statistics.median(run["itl_meanwhile_p99_s"] / run["itl_before_p50_s"] for run in runs), 2
        ),
        "ttft_over_alone": round(statistics.median(run["ttft_beside_s"] / run["ttft_alone_s"] for run in runs), 2),
        "runs": runs,
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
