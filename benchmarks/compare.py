"""Decode and prefill of Stageline, transformers and, where its Python is given, vLLM: taken in turn, on the same weights and
prompts. Prints a table and one JSON object.

    python -m benchmarks.compare --model DIR [--stages 1 2] [--dtype bfloat16] [--vllm-python /path/to/python] [--repeats 5]
    [--alone | --others-dtype float32]

Greedy. Decode: 128-token prompts, 64 new tokens, (requests answered in full less
requests for one token alone, the same for all systems). Prefill:
tokens of one 2,048-token prompt over its time to first token. Two limits are taken in the same turns: the model's matrix
products alone (benchmarks/worker_products.py) at the same rows and threads, of each number of stages, and for one stream what
reading the weights once a token allows: the best read-only sum over 2 GB, divided by their bytes.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from operator import truediv as divide
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.report import here
from benchmarks.servers import serving
from gateway.bench.load import Generator, Shape
from gateway.bench.measure import checked

SHAPE = Shape(prompt_tokens=128, new_tokens=64)
PREFILL_TOKENS = 2048
LIMIT = "products alone"
WARM_STREAMS = 16


class Contender(Protocol):
    """Something that decodes."""

    def decode_rate(self, streams: int) -> float:
        """Tokens a second of all streams together."""
        ...

    def prefill_rate(self, tokens: int) -> float:
        """Tokens a second of one prompt."""
        ...


class Stageline:
    """A running `stageline serve`, through its gRPC door."""

    def __init__(self, address: str) -> None:
        self._address = address

    def decode_rate(self, streams: int) -> float:
        """See Contender."""

        async def measure() -> float:
            async with Generator(self._address, seed=time.monotonic_ns()) as load:

                async def seconds(new_tokens: int) -> float:
                    shape = Shape(SHAPE.prompt_tokens, new_tokens)
                    outcomes = checked(await load.closed_loop([shape] * streams, streams))
                    return max(o.token_s[-1] for o in outcomes) - min(o.sent_s for o in outcomes)

                decode_s = await seconds(SHAPE.new_tokens) - await seconds(1)
                return streams * (SHAPE.new_tokens - 1) / decode_s

        return asyncio.run(measure())

    def prefill_rate(self, tokens: int) -> float:
        """See Contender."""

        async def measure() -> float:
            async with Generator(self._address, seed=time.monotonic_ns()) as load:
                return tokens / (await load.run(Shape(tokens, 1))).ttft_s

        return asyncio.run(measure())


class Worker:
    """Another system in a process of its own: reads `decode STREAMS` or `prefill TOKENS`, answers tokens a second."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def decode_rate(self, streams: int) -> float:
        """See Contender."""
        return self._ask(f"decode {streams}")

    def prefill_rate(self, tokens: int) -> float:
        """See Contender."""
        return self._ask(f"prefill {tokens}")

    def _ask(self, what: str) -> float:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return float(read_marked(self._process))


@contextmanager
def fresh(model: str, stages: int, dtype: str) -> Iterator[Contender]:
    """A server for one turn: Ray's own processes take a tenth of a core, also while another contender is measured."""
    with serving(model, stages, "--dtype", dtype) as address:
        server = Stageline(address)
        server.decode_rate(WARM_STREAMS)
        server.prefill_rate(PREFILL_TOKENS)
        yield server


@contextmanager
def resident(contender: Contender) -> Iterator[Contender]:
    """One that stays over all turns: it loads for minutes, and takes no time while it waits."""
    yield contender


def read_marked(process: subprocess.Popen[str]) -> str:
    """The next line that is for us: other systems print what they like on stdout."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("@@ "):
            return line[3:].strip()
    raise SystemExit(f"a worker ended with exit code {process.wait()}")


@contextmanager
def working(python: str, name: str, model: str, dtype: str, *more: str) -> Iterator[Contender]:
    """A worker script of this folder under the given Python, which may not have our packages."""
    script = Path(__file__).parent / f"worker_{name}.py"
    what = (
        ["-m", f"benchmarks.{script.stem}"] if python == sys.executable else ["-P", str(script)]
    )  # -P: `kernels` beside it is not the package
    command = [python, *what, model, dtype, str(SHAPE.prompt_tokens), str(SHAPE.new_tokens), *more]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        read_marked(process)  # loaded
        yield Worker(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()


def staged(num_stages: int) -> str:
    """A number of stages in words."""
    return f"{num_stages} stage{'s' * (num_stages > 1)}"


def streaming_bandwidth() -> float:
    """Bytes a second of the best of five read-only sums over 2 GB, on all cores."""
    from concurrent.futures import ThreadPoolExecutor

    data = np.ones(1 << 28, dtype=np.float64)
    parts = np.array_split(data, os.cpu_count() or 1)
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


def main() -> int:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], help="our pipelines")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all contenders")
    parser.add_argument(
        "--others-dtype", choices=("bfloat16", "float32"),
        help="of transformers and vLLM: float32 is the faster one for them on a CPU without instructions for bfloat16",
    )  # fmt: skip
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="of decode")
    parser.add_argument("--vllm-python", help="a Python that has vLLM for CPUs; without it vLLM is left out")
    parser.add_argument("--alone", action="store_true", help="beside the limits only, without transformers and vLLM")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    bandwidth = streaming_bandwidth()
    cases = [*(("decode", streams) for streams in args.streams), ("prefill", PREFILL_TOKENS)]
    with ExitStack() as stack:
        entered: dict[str, Callable[[], AbstractContextManager[Contender]]] = {
            f"stageline, {staged(n)}": partial(fresh, args.model, n, args.dtype) for n in args.stages
        }
        others: dict[str, tuple[str, ...]] = {
            f"{LIMIT}, {staged(n)}": (sys.executable, "products", str(n)) for n in args.stages
        }
        if not args.alone:
            others["transformers"] = (sys.executable, "transformers")
            if args.vllm_python:
                others["vllm"] = (args.vllm_python, "vllm")
        for name, (python, script, *more) in others.items():
            dtype = args.dtype if name.startswith(LIMIT) else args.others_dtype or args.dtype
            worker = stack.enter_context(working(python, script, args.model, dtype, *more))
            entered[name] = partial(resident, worker)
        runs: dict[str, dict[str, list[float]]] = {name: {} for name in entered}
        for turn in range(args.repeats + 1):
            for name, enter in entered.items():
                with enter() as contender:
                    for kind, size in cases:
                        rate = contender.decode_rate(size) if kind == "decode" else contender.prefill_rate(size)
                        if turn:  # the first turn warms up
                            runs[name].setdefault(f"{kind} {size}", []).append(rate)
            so_far = {name: {case: round(rates[-1], 1) for case, rates in by.items()} for name, by in runs.items()}
            print(f"turn {turn} of {args.repeats}: {json.dumps(so_far)}", file=sys.stderr, flush=True)
    weights = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
    weights *= 2 if args.dtype == "float32" else 1  # the files are bfloat16
    medians = {name: {case: statistics.median(rates) for case, rates in by.items()} for name, by in runs.items()}
    print(table(medians, bandwidth / weights))
    ours = {name: by for name, by in runs.items() if name.startswith("stageline")}
    report = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "others_dtype": args.others_dtype or args.dtype,
        "shape": [SHAPE.prompt_tokens, SHAPE.new_tokens],
        **here(),
        "streaming_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "median_tokens_per_s": medians,
        # The median of the ratios of runs that followed each other: what slowed the machine down slowed both.
        "ratio_to": {
            mine: {
                other: {case: round(statistics.median(map(divide, by[case], runs[other][case])), 2) for case in by}
                for other in runs
                if other not in ours
            }
            for mine, by in ours.items()
        },
        "runs": runs,
    }
    print(json.dumps(report))
    return 0


def table(medians: dict[str, dict[str, float]], limit: float) -> str:
    """Tokens a second, one line a contender."""
    cases = list(next(iter(medians.values())))
    lines = [f"{'tokens a second':26}" + "".join(f"{case:>14}" for case in cases)]
    lines += [f"{name:26}" + "".join(f"{by[case]:>14.1f}" for case in cases) for name, by in medians.items()]
    return "\n".join([*lines, f"{'weights / bandwidth':26}{limit:>14.1f}"])


if __name__ == "__main__":
    sys.exit(main())
