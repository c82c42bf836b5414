"""A batch while the gateway, which runs its lines, is killed again and again; then beside interactive streams.

`python -m benchmarks.batch --model FOLDER [--lines 20000] [--kills 10] [--stages 1]` starts a server of its own. In turn: the rate of
plain requests of the lines' shape, the batch undisturbed, the batch with SIGKILLs at random places in it, and the time between tokens of
interactive streams alone and beside a batch. Fails if a custom_id is missing or comes twice. What is repeated is counted as the requests
that were in the engine when it was killed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import about, options
from benchmarks.servers import GATEWAY, serving_doors
from gateway.bench.load import Generator, Outcome, Shape
from gateway.bench.measure import checked, percentiles

VOCABULARY = 20_000  # token ids below it are ordinary text in every model served
INTERACTIVE = Shape(64, 64)
POLL_S = 0.5


def write_lines(path: Path, count: int, shape: Shape, vocabulary: int, seed: int) -> None:
    """A batch input: greedy completions of random token ids."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            ids = [rng.randrange(100, vocabulary) for _ in range(shape.prompt_tokens)]
            body = {"prompt": ids, "max_tokens": shape.new_tokens, "temperature": 0}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


async def run_batch(
    folder: Path, name: str, count: int, shape: Shape, vocabulary: int, address: str, seed: int
) -> float:
    """Lines a second from submission to the file; every custom_id is there exactly once."""
    source, out = folder / f"{name}.jsonl", folder / f"{name}.out.jsonl"
    write_lines(source, count, shape, vocabulary, seed)
    began_s = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.cli", "batch", "submit", str(source), "--output-file", str(out), "--wait",
        "--address", address, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    if code := await process.wait():
        raise SystemExit(f"batch {name} ended with exit code {code}")
    took_s = time.perf_counter() - began_s
    found = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]
    if sorted(found) != sorted(f"line-{number}" for number in range(count)):
        raise SystemExit(f"batch {name}: {len(found)} records, {len(set(found))} custom_ids, expected {count}")
    return count / took_s


def newest_batch(url: str) -> dict[str, Any]:
    """As /v1/batches has it."""
    with urllib.request.urlopen(f"{url}/v1/batches?limit=1", timeout=5) as answer:
        batch: dict[str, Any] = json.load(answer)["data"][0]
    return batch


def open_requests(url: str) -> int:
    """Requests in the engine now."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return sum(int(float(value)) for value in re.findall(r"^\S*num_open_requests\S* (\S+)$", text, re.MULTILINE))


async def kill_often(url: str, before: str, moments: list[int], lost: list[int]) -> None:
    """SIGKILL the gateway's process when so many lines of the batch after `before` are done, at each of the moments; appends how
    many requests it had."""
    for moment in sorted(moments):
        num_open, done = 0, -1
        while done < moment:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(OSError):  # it is not back yet
                num_open = await asyncio.to_thread(open_requests, url)
                batch = await asyncio.to_thread(newest_batch, url)
                counts = batch["request_counts"]
                done = -1 if batch["id"] == before else counts["completed"] + counts["failed"]
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # another process ended meanwhile
                if process.cmdline()[:1] == [GATEWAY]:
                    process.kill()
        lost.append(num_open)


async def gaps_beside(address: str, streams: int, seed: int, until: Callable[[], Awaitable[Any]]) -> list[float]:
    """Seconds between tokens of interactive streams that come one after another until `until` returns."""
    outcomes: list[Outcome] = []
    stop = asyncio.Event()

    async def stream(load: Generator) -> None:
        while not stop.is_set():
            outcomes.append(await load.run(INTERACTIVE))

    async with Generator(address, seed) as load:
        tasks = [asyncio.create_task(stream(load)) for _ in range(streams)]
        await until()
        stop.set()
        await asyncio.gather(*tasks)
    return [gap for outcome in checked(outcomes) for gap in outcome.gaps_s]


async def measure(url: str, address: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after another."""
    shape, rng, lost = Shape(args.prompt_tokens, args.new_tokens), random.Random(args.seed), list[int]()
    async with Generator(address, args.seed) as load:
        vocabulary = min(VOCABULARY, load.model.vocab_size)
        await load.closed_loop([shape] * args.concurrency, args.concurrency)  # warm
        began_s = time.perf_counter()
        checked(await load.closed_loop([shape] * args.calm_lines, args.concurrency))
        plain = args.calm_lines / (time.perf_counter() - began_s)
    _say(f"{plain:.2f} plain requests a second")
    calm = await run_batch(folder, "calm", args.calm_lines, shape, vocabulary, address, args.seed + 1)
    _say(f"{calm:.2f} lines of a batch a second")
    alone = await gaps_beside(address, args.streams, args.seed, lambda: asyncio.sleep(args.alone_s))
    beside = await gaps_beside(
        address, args.streams, args.seed,
        lambda: run_batch(folder, "beside", args.calm_lines, shape, vocabulary, address, args.seed + 2),
    )  # fmt: skip
    p99 = percentiles(alone)["p99"], percentiles(beside)["p99"]
    _say(f"p99 between tokens: {p99[0]} ms alone, {p99[1]} ms beside a batch")
    moments = [rng.randrange(args.lines) for _ in range(args.kills)]
    killer = asyncio.create_task(kill_often(url, newest_batch(url)["id"], moments, lost))
    killed = await run_batch(folder, "killed", args.lines, shape, vocabulary, address, args.seed + 3)
    killer.cancel()
    await asyncio.gather(killer, return_exceptions=True)
    return {
        "requests_per_s": round(plain, 2),
        "batch_lines_per_s": round(calm, 2),
        "batch_to_requests": round(calm / plain, 3),
        "killed_lines_per_s": round(killed, 2),
        "kills": len(lost),
        "repeated_lines": sum(lost),
        "repeated_share": round(sum(lost) / args.lines, 4),
        "interactive_itl_p99_ms": {"alone": p99[0], "beside_a_batch": p99[1], "ratio": round(p99[1] / p99[0], 2)},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Serve, measure, print."""
    parser = options(__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lines", type=int, default=20_000, help="of the batch with kills")
    parser.add_argument("--calm-lines", type=int, default=1_000, help="of the other batches")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=32, help="lines, or plain requests, at a time")
    parser.add_argument("--streams", type=int, default=4, help="interactive ones")
    parser.add_argument("--alone-s", type=float, default=20.0, help="how long those run without a batch")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            f"--batch.state-url=sqlite:///{folder}/state.db", f"--batch.max-concurrency={args.concurrency}",
            f"--dtype={args.dtype}",
        ]  # fmt: skip
        with serving_doors(args.model, args.stages, *flags) as (url, address):
            figures = asyncio.run(measure(url, address, Path(folder), args))
    print(json.dumps({**about("batch", args), "dtype": args.dtype, "lines": args.lines, **figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
