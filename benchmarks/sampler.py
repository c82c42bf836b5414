"""What sampling costs a step: on the last stage once its logits are there, and in the gateway. Prints Markdown tables.

`python -m benchmarks.sampler`. Logits are normal; `--scale` times as wide: at 8 a nucleus of 0.95 holds some tens of
tokens, at 3 more than 4,096. Stage and gateway are timed apart, each the median of the runs, in turn over the cases.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from gateway import sampling as gateway_sampling
from gateway.sampling import choose, make_sampling
from gateway.types import SamplingParams
from stages.logits import LogitsProcessor

GREEDY = SamplingParams(temperature=0)
CASES = {
    "greedy": [GREEDY],
    "greedy, 5 log-probabilities": [SamplingParams(temperature=0, num_logprobs=5)],
    "temperature 1": [SamplingParams()],
    "top-p 0.95": [SamplingParams(top_p=0.95)],
    "top-k 50": [SamplingParams(top_k=50)],
    "min-p 0.05": [SamplingParams(min_p=0.05)],
    "penalties": [SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1)],
    "15 of 16 greedy, 1 top-k 50": [SamplingParams(top_k=50)] + [GREEDY] * 15,
}
PROMPT = tuple(range(1000, 1400))


class Case:
    """One kind of micro-batch, with the logits all cases share."""

    def __init__(self, kinds: list[SamplingParams], logits_RV: torch.Tensor) -> None:
        self.params = [kinds[i % len(kinds)] for i in range(len(logits_RV))]
        self.logits_RV = logits_RV
        self.processor = LogitsProcessor(logits_RV.shape[1], logits_RV.device)
        self.results = self.processor.process(logits_RV.clone(), self.rows(register=True))
        self.times: dict[str, list[float]] = {}

    def rows(self, *, register: bool = False) -> list[Any]:
        """The first position of each sequence; run again, it changes no history."""
        rows = []
        for index, params in enumerate(self.params):
            registration = (PROMPT, ()) if register and params.has_penalties() else None
            asked = make_sampling(params, choice_index=index, output_position=0, registration=registration)
            rows.append((index, np.array(PROMPT[-1:], np.int32), len(PROMPT), asked))
        return rows

    def timed(self, name: str, run: Callable[[], object]) -> None:
        """Add one run's milliseconds."""
        begun_s = time.perf_counter()
        run()
        self.times.setdefault(name, []).append(1e3 * (time.perf_counter() - begun_s))

    def measure(self) -> None:
        """The stage once, and both ways of choosing in the gateway."""
        self.timed("stage", partial(self.processor.process, self.logits_RV.clone(), self.rows()))
        self.timed("one by one", self.choose_one_by_one)
        together = getattr(gateway_sampling, "choose_rows", None)  # so that earlier commits can be measured
        if together is not None:
            zeros, indices = [0] * len(self.params), range(len(self.params))
            self.timed(
                "together", partial(together, self.results, self.params, choice_indices=indices, positions=zeros)
            )

    def choose_one_by_one(self) -> None:
        """The gateway's slow twin."""
        for index, (result, params) in enumerate(zip(self.results, self.params, strict=True)):
            choose(result, params, choice_index=index, position=0)

    def line(self) -> Iterator[str]:
        """Medians in milliseconds a step, then candidates a row."""
        for name in ("stage", "one by one", "together"):
            yield f"{statistics.median(self.times[name]):.2f}" if name in self.times else "-"
        yield f"{sum(len(result.candidate_ids) // 4 for result in self.results) / len(self.results):.0f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--scale", type=float, nargs="+", default=[8.0, 3.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {args.threads} thread(s)\n")
    print("| scale | rows | case | stage, ms | gateway one by one, ms | together, ms | candidates a row |")
    print("|---|---|---|---|---|---|---|")
    for scale in args.scale:
        for num_rows in args.rows:
            generator = torch.Generator().manual_seed(num_rows)
            logits_RV = torch.randn(num_rows, args.vocab_size, generator=generator) * scale
            cases = {name: Case(kinds, logits_RV) for name, kinds in CASES.items()}
            for _ in range(args.repeats):
                for case in cases.values():
                    case.measure()
            for name, case in cases.items():
                print(f"| {scale:g} | {num_rows} | {name} | {' | '.join(case.line())} |", flush=True)


if __name__ == "__main__":
    main()
