"""The server that fuzz.py throws at: both doors and batches over toy stages, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import doors_helpers
from engine_helpers import EOS, NUM_LAYERS, Cluster, byte_tokenizer, until

from gateway.api.service import Frontend
from gateway.batch.opening import open_batches
from gateway.config import BatchSection
from gateway.tokenizer import ChatTemplate


async def serve() -> None:
    """Both doors over toy stages until stdin ends; prints the addresses."""
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, num_blocks=1024)
    engine = await cluster.start(eos_token_ids=(EOS,))
    await until(engine.ready)
    doors = doors_helpers.Doors()
    doors.frontend = Frontend(engine, byte_tokenizer(), ChatTemplate(doors_helpers.TEMPLATE), engine.model)
    with tempfile.TemporaryDirectory() as folder:
        batches = await open_batches(doors.frontend, BatchSection(state_url=f"sqlite:///{folder}/state.db"))
        async with doors_helpers.open_doors(doors, batches=batches):
            print(doors.grpc, doors.http, flush=True)
            watching = asyncio.create_task(_longest_hold_s())
            await asyncio.to_thread(sys.stdin.read)
            watching.cancel()
            print(round(_hold_s[0], 3), _trimmed_bytes(), flush=True)
        await batches.stop()
    await cluster.stop()


def _trimmed_bytes() -> int:
    """Resident memory once the allocator has given back what nothing uses: what is left is held by somebody."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


_hold_s = [0.0]


async def _longest_hold_s() -> None:
    """Keep in `_hold_s` the most CPU time that the event loop's thread took between two turns of 50 ms: how long one
    hostile call held up the others, however busy the machine is."""
    while True:
        before_s = time.thread_time()
        await asyncio.sleep(0.05)
        _hold_s[0] = max(_hold_s[0], time.thread_time() - before_s)


@asynccontextmanager
async def served() -> AsyncIterator[tuple[asyncio.subprocess.Process, str, str]]:
    """A server in a process of its own: it, its gRPC address and its HTTP URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.fuzz_gateway",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode().split()
        yield process, line[0], line[1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(serve())
