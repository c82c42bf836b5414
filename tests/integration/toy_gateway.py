"""Gateways over the toy engine in processes of their own, to be killed.

`python toy_gateway.py` forks one for every line `PORT FINGERPRINT [BATCH_STATE_URL]` on stdin and prints `PID PORT` once it
serves. Forked, not started anew: what takes seconds is importing, and that is done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import engine_helpers
from engine_helpers import NUM_LAYERS, Cluster, byte_tokenizer, until

from gateway.api.grpc.server import serve_grpc
from gateway.api.service import Frontend
from gateway.batch.opening import open_batches
from gateway.config import BatchSection


async def serve(port: int, fingerprint: str, state_url: str | None) -> None:
    """Until killed."""
    engine_helpers.FINGERPRINT = fingerprint
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=0.004, num_blocks=512)
    engine = await cluster.start(check_integrity=False)
    await until(engine.ready)
    frontend = Frontend(engine, byte_tokenizer(), None, engine.model)
    batches = await open_batches(frontend, BatchSection(state_url=state_url))
    server = await serve_grpc(frontend, "127.0.0.1", port, batches=batches)
    print(os.getpid(), server.port, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Fork for every line until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    for line in sys.stdin:
        port, fingerprint, *state_url = line.split()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            asyncio.run(serve(int(port), fingerprint, *(state_url or [None])))


if __name__ == "__main__":
    main()
