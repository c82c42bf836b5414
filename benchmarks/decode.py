"""Decode throughput through the gRPC door, on the demo's model: `make bench`. Prints one JSON object.

128-token prompts and 64 new tokens, greedy, 1 and 16 streams; the median of 5 runs of each, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.compare import SHAPE, Stageline
from benchmarks.report import here
from benchmarks.servers import serving
from gateway.demo import fetch_model

STREAMS = (1, 16)
REPEATS = 5


def main() -> int:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the demo's SmolLM2-135M")
    parser.add_argument("--stages", type=int, default=2)
    args = parser.parse_args()
    model = args.model or str(fetch_model())
    rates: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    with serving(model, args.stages) as address:
        server = Stageline(address)
        for turn in range(REPEATS + 1):
            for streams, runs in rates.items():
                rate = server.decode_rate(streams)
                if turn:  # the first turn warms up
                    runs.append(rate)
    report = {
        "what": "decode, tokens a second of all streams together",
        "model": Path(model).name,
        "shape": [SHAPE.prompt_tokens, SHAPE.new_tokens],
        "stages": args.stages,
        "dtype": "bfloat16",
        **here(),
        "median": {str(streams): round(statistics.median(runs), 1) for streams, runs in rates.items()},
        "runs": {str(streams): [round(rate, 1) for rate in runs] for streams, runs in rates.items()},
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
