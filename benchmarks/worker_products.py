"""The model's matrix products alone for benchmarks/compare.py: MODEL DTYPE PROMPT_TOKENS NEW_TOKENS [STAGES]; `decode STREAMS` or
`prefill TOKENS` a line in, tokens a second out. The limit that products set, with the threads that `stageline serve` takes.

With several stages each is a process with its own layers and threads, and all multiply at the same time, as they do in a full
pipeline: of decode an even share of the streams, of a prompt a chunk. The slowest of them sets the limit.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from benchmarks.kernels import load, products_alone
from gateway.planner.split import split
from stages.checkpoint import open_checkpoint
from stages.runner import DTYPES

MEASURE_S = 2.0


def multiply(model: str, dtype: str, stage: int, stages: int, pipe: Connection) -> None:
    """One stage, in a process of its own: (tokens, rows that need logits) in, seconds a step out."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // stages))
    checkpoint = open_checkpoint(model)
    runner = load(checkpoint, DTYPES[dtype], split(checkpoint.config, stages)[stage])
    pipe.send(0.0)
    while True:
        tokens, rows = pipe.recv()
        run = products_alone(runner, tokens, rows)
        run()
        pipe.send(0.0)
        pipe.recv()  # all are warm
        count, began_s = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - began_s < MEASURE_S:
            run()
            count += 1
        pipe.send((time.perf_counter() - began_s) / count)


def main() -> None:
    """Serve until stdin ends."""
    model, dtype, stages = sys.argv[1], sys.argv[2], int(sys.argv[5]) if len(sys.argv) > 5 else 1
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for stage in range(stages):
        pipe, theirs = multiprocessing.Pipe()
        spawn.Process(target=multiply, args=(model, dtype, stage, stages, theirs), daemon=True).start()
        pipes.append(pipe)

    def ask(*what: object, of: Sequence[Connection] = pipes) -> list[float]:
        for pipe in of:
            pipe.send(what)
        return [pipe.recv() for pipe in of]

    for pipe in pipes:
        pipe.recv()  # loaded
    print("@@ ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        tokens = max(1, int(size) // stages)
        ask(tokens, tokens if kind == "decode" else 1)
        if int(size) >= stages:
            step_s = max(ask("go"))
        else:  # one stream is in one stage at a time
            step_s = sum(ask("go", of=[pipe])[0] for pipe in pipes)
        print(f"@@ {tokens / step_s}", flush=True)


if __name__ == "__main__":
    main()
