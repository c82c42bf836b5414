"""How much a stage's transport takes from its compute thread: small torch operations while payloads come in.

`python -m benchmarks.overlap`: a process computes (products and elementwise operations of a small decode step) and
receives payloads on its event loop, as a stage does, from another process that sends as fast as it may. In turn: nothing
comes, payloads come in frames, payloads come through shared memory; each way at the same number of payloads a second.
Figures are milliseconds of a step by the clock and of the compute thread's own CPU time, and of all threads of the
process. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import torch

from benchmarks.report import here
from stages.server.frames import Assembler, StepFrame
from stages.server.link import DATA_SERVICE, OPTIONS, Link
from stages.server.ring import OFFER, PROOF, attached

WAYS = {"nothing": None, "frames": 0, "shared": 128 << 20}


def _send(port: int, payload_bytes: int, interval_s: float, orders: Connection) -> None:
    asyncio.run(_sending(f"127.0.0.1:{port}", payload_bytes, interval_s, orders))


async def _sending(address: str, payload_bytes: int, interval_s: float, orders: Connection) -> None:
    payload = memoryview(bytes(payload_bytes))
    while True:
        ring_bytes = await asyncio.to_thread(orders.recv)
        link = Link(address, 1, "bench", lambda event: None, shared_memory_bytes=ring_bytes)
        await link.open()
        stop = asyncio.ensure_future(asyncio.to_thread(orders.recv))
        due_s = time.monotonic()
        while not stop.done():
            await link.send(StepFrame(1, 1, b"", payload=payload))
            due_s = max(due_s + interval_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
        await link.close()
        orders.send("stopped")


async def _forward(requests: Any, context: Any) -> bytes:
    offer = dict(context.invocation_metadata()).get(OFFER)
    ring = attached(offer) if offer is not None else None
    if offer is not None:
        await context.send_initial_metadata(((PROOF, ring.proof if ring is not None else ""),))
    assembler = Assembler(ring=ring)
    while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        frame = assembler.feed(message)
        if frame is not None:
            _received.append(len(frame.payload))
            if frame.give_back is not None:
                frame.give_back()
    return b""


_received: list[int] = []


def _compute(steps: int) -> tuple[float, float]:
    """(clock, CPU of this thread): milliseconds a step."""
    weight_OI, hidden_TI = torch.ones(896, 896), torch.ones(4, 896)
    began_s, cpu_s = time.monotonic(), time.thread_time()
    for _ in range(steps):
        for _ in range(100):
            hidden_TI = torch.nn.functional.silu(hidden_TI @ weight_OI.T) * 1e-3
    return 1e3 * (time.monotonic() - began_s) / steps, 1e3 * (time.thread_time() - cpu_s) / steps


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    server = grpc.aio.server(options=OPTIONS)
    handlers = {"Forward": grpc.stream_unary_rpc_method_handler(_forward)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(DATA_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    orders, theirs = multiprocessing.Pipe()
    interval_s = 1 / args.payloads_per_s
    sender = multiprocessing.get_context("spawn").Process(
        target=_send, args=(port, args.payload_bytes, interval_s, theirs), daemon=True
    )
    sender.start()
    figures: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    try:
        for turn in range(args.repeats + 1):
            for way, ring_bytes in WAYS.items():
                if ring_bytes is not None:
                    orders.send(ring_bytes)
                    await asyncio.sleep(0.5)
                _received.clear()
                began_s, process_s = time.monotonic(), time.process_time()
                clock_ms, cpu_ms = await asyncio.to_thread(_compute, args.steps)
                took_s = time.monotonic() - began_s
                row = {
                    "step_ms": clock_ms,
                    "compute_thread_cpu_ms": cpu_ms,
                    "other_threads_cpu_share": (time.process_time() - process_s - cpu_ms * args.steps / 1e3) / took_s,
                    "payloads_per_s": len(_received) / took_s,
                }
                if ring_bytes is not None:
                    orders.send(None)
                    await asyncio.to_thread(orders.recv)
                if turn:  # the first one warms up
                    for name, value in row.items():
                        figures[way].setdefault(name, []).append(value)
    finally:
        sender.kill()
        sender.join()
        await server.stop(None)
    return {way: {name: round(statistics.median(v), 3) for name, v in row.items()} for way, row in figures.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payload-bytes", type=int, default=4 << 20)
    parser.add_argument("--payloads-per-s", type=float, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "what": "a compute thread beside transport",
        "payload_bytes": args.payload_bytes,
        "asked_payloads_per_s": args.payloads_per_s,
        **here(),
        "results": asyncio.run(_measure(args)),
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
