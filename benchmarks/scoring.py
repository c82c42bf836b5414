"""What scoring many continuations of one context costs, against the compute of the context once plus the continuations.

    python -m benchmarks.scoring --model DIR [--stages 2] [--dtype float32] [--continuations 1000] [--repeats 5]

The reference is the same server on the same number of tokens without sharing: one prompt of the context's length, and the
continuations' tokens as prompts of CHUNK_TOKENS tokens whose log-probabilities are asked for, all sent together. Every run
draws new tokens, so that no cache holds them; runs alternate. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path

from benchmarks.report import here
from benchmarks.servers import given_or_serving
from stageline.client import AsyncClient
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import scoring_pb2

CONTEXT_TOKENS = 512
CHUNK_TOKENS = 500


def main() -> int:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--continuations", type=int, default=1000)
    parser.add_argument("--continuation-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server", nargs=2, metavar=("URL", "GRPC_ADDRESS"), help="one that serves the model already")
    args = parser.parse_args()
    with given_or_serving(args.server, args.model, args.stages, "--dtype", args.dtype) as (_, address):
        runs = asyncio.run(measure(address, args.continuations, args.continuation_tokens, args.repeats))
    median = {name: statistics.median(seconds) for name, seconds in runs.items()}
    report = {
        "what": "seconds to score continuations of one context",
        "model": Path(args.model).name,
        "stages": args.stages,
        "dtype": args.dtype,
        "context_tokens": CONTEXT_TOKENS,
        "continuations": [args.continuations, args.continuation_tokens],
        **here(),
        "median_s": {name: round(value, 3) for name, value in median.items()},
        "runs_s": {name: [round(value, 3) for value in seconds] for name, seconds in runs.items()},
        "cost": round(median["score"] / (median["context"] + median["continuations"]), 3),
        "target": 1.3,
    }
    print(json.dumps(report, indent=2))
    return 0


async def measure(address: str, count: int, length: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, by what was run; a first turn that warms up is left out."""
    rng = random.Random(0)
    runs: dict[str, list[float]] = {"score": [], "context": [], "continuations": []}
    async with AsyncClient(address) as client:
        vocab_size = (await client.get_model()).vocab_size

        def tokens(number: int) -> gen.TokenIds:
            return gen.TokenIds(ids=[rng.randrange(vocab_size) for _ in range(number)])

        async def score() -> None:
            continuations = [scoring_pb2.Continuation(token_ids=tokens(length)) for _ in range(count)]
            await client.score(scoring_pb2.ScoreRequest(token_ids=tokens(CONTEXT_TOKENS), continuations=continuations))

        async def context() -> None:
            await client.generate(
                gen.Generation(token_ids=tokens(CONTEXT_TOKENS), stop=gen.StopConditions(max_tokens=1))
            )

        async def continuations() -> None:
            whole, rest = divmod(count * length, CHUNK_TOKENS)
            sizes = [CHUNK_TOKENS] * whole + [rest] * (rest > 1)
            await asyncio.gather(*(client.generate(_scored(tokens(size))) for size in sizes))

        for turn in range(repeats + 1):
            for run in (score, context, continuations):
                started_s = time.monotonic()
                await run()
                if turn:
                    runs[run.__name__].append(time.monotonic() - started_s)
    return runs


def _scored(prompt: gen.TokenIds) -> gen.Generation:
    return gen.Generation(
        token_ids=prompt,
        stop=gen.StopConditions(max_tokens=0),
        output=gen.OutputOptions(num_prompt_logprobs=0),
    )


if __name__ == "__main__":
    sys.exit(main())
