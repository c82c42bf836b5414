"""A gateway over the toy engine in a process of its own, to be killed: `python toy_gateway.py PORT`, prints the port."""

from __future__ import annotations

import asyncio
import sys

from engine_helpers import NUM_LAYERS, Cluster, byte_tokenizer, until

from gateway.api.grpc.server import serve_grpc
from gateway.api.service import Frontend


async def main(port: int) -> None:
    """Serve until killed."""
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=0.004, num_blocks=512)
    engine = await cluster.start(check_integrity=False)
    await until(engine.ready)
    server = await serve_grpc(Frontend(engine, byte_tokenizer(), None, engine.model), "127.0.0.1", port)
    print(server.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
