"""Gateways over the toy engine in processes of their own, to be killed.

`python toy_gateway.py` forks one for every line `PORT FINGERPRINT` on stdin and prints `PID PORT` once it serves. Forked,
not started anew: what takes seconds is importing, and that is done.
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


async def serve(port: int, fingerprint: str) -> None:
    """Until killed."""
    engine_helpers.FINGERPRINT = fingerprint
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=0.004, num_blocks=512)
    engine = await cluster.start(check_integrity=False)
    await until(engine.ready)
    server = await serve_grpc(Frontend(engine, byte_tokenizer(), None, engine.model), "127.0.0.1", port)
    print(os.getpid(), server.port, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Fork for every line until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    for line in sys.stdin:
        port, fingerprint = line.split()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            asyncio.run(serve(int(port), fingerprint))


if __name__ == "__main__":
    main()
