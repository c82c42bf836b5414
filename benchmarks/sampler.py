"""What the last stage spends on sampling after its logits are there: `LogitsProcessor.process`, milliseconds a step.

PYTHONPATH=proto:. python benchmarks/sampler.py

Logits of a trained model are peaked, and how much decides how far a nucleus reaches: `--scale` multiplies standard normal
logits (8: a 0.95 nucleus of some tens of tokens; 3: of some thousands). The minimum and the median of the runs are printed;
the random logits are the same for every case, and each run gets a fresh copy of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np
import torch

from gateway.sampling import make_sampling
from gateway.types import SamplingParams
from stages.logits import LogitsProcessor

CASES = {
    "greedy": [SamplingParams(temperature=0)],
    "greedy, logprobs 5": [SamplingParams(temperature=0, num_logprobs=5)],
    "temperature 1": [SamplingParams()],
    "top-p 0.95": [SamplingParams(top_p=0.95)],
    "top-k 50": [SamplingParams(top_k=50)],
    "penalties": [SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1)],
    "greedy, 1 of 16 sampled": [SamplingParams(temperature=0)] * 15 + [SamplingParams(top_k=50)],
}


def measure(logits_RV: torch.Tensor, kinds: list[SamplingParams], repeats: int) -> list[float]:
    """Milliseconds of each run, after one that is not counted."""
    num_rows, vocab_size = logits_RV.shape
    processor = LogitsProcessor(vocab_size, logits_RV.device)
    history = tuple(range(1000, 1400))
    runs = []
    for run in range(repeats + 1):
        rows = []
        for index in range(num_rows):
            params = kinds[-1 - index % len(kinds)]
            registration = (history, ()) if params.has_penalties() and run == 0 else None
            sampling = make_sampling(params, choice_index=index, output_position=run, registration=registration)
            rows.append((index, np.array([run], np.int32), len(history) + run, sampling))
        fresh_RV = logits_RV.clone()
        begun_s = time.perf_counter()
        processor.process(fresh_RV, rows)
        runs.append(1e3 * (time.perf_counter() - begun_s))
    return runs[1:]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--scale", type=float, nargs="+", default=[8.0, 3.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"# {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {args.threads} threads\n")
    print("| scale | case | rows | ms a step, best | median | best a row |\n|---|---|---|---|---|---|")
    for scale in args.scale:
        for num_rows in args.rows:
            generator = torch.Generator().manual_seed(num_rows)
            logits_RV = torch.randn(num_rows, args.vocab_size, generator=generator) * scale
            for name in args.cases:
                runs = measure(logits_RV, CASES[name], args.repeats)
                best = min(runs)
                print(
                    f"| {scale:g} | {name} | {num_rows} | {best:.2f} | {statistics.median(runs):.2f} | {best / num_rows:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
