"""The model's matrix products alone for benchmarks/compare.py: MODEL PROMPT_TOKENS NEW_TOKENS; `decode STREAMS` or
`prefill TOKENS` a line in, tokens a second out. The limit that products set, with the threads that torch takes by itself."""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.kernels import load, products_alone
from stages.checkpoint import open_checkpoint

MEASURE_S = 2.0


def main() -> None:
    """Serve until stdin ends."""
    runner = load(open_checkpoint(sys.argv[1]), torch.bfloat16)
    print("@@ ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        rows = int(size)
        run = products_alone(runner, rows, rows if kind == "decode" else 1)
        run()
        count, began_s = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - began_s < MEASURE_S:
            run()
            count += 1
        print(f"@@ {rows * count / (time.perf_counter() - began_s)}", flush=True)


if __name__ == "__main__":
    main()
