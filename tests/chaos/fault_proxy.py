"""A TCP proxy on loopback that makes a network bad on command: slow, silent, cut or reset.

It copies bytes both ways and looks at none. Faults hold for all connections, those that are open included.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct

CHUNK_BYTES = 64 << 10
QUEUE_CHUNKS = 64  # each way of a connection: a slow way holds its sender back, as a full pipe does


class FaultProxy:
    """Stands before one address. Change the attributes while it runs.

    `delay_s` and `jitter_s`: every chunk arrives delay_s ± jitter_s late, in order; chunks wait side by side, so the delay
    costs time and not throughput. `stall()` keeps all bytes back, and new connections too, until `resume()`. `reset()`
    breaks every connection with RST. `cut_after_bytes` breaks a connection in the middle of a chunk, once that many bytes
    went to the target; it is used up by the first connection that reaches it.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.target = (host, port)
        self.delay_s = self.jitter_s = 0.0
        self.cut_after_bytes: int | None = None
        self.num_accepted = self.num_cut = self.bytes_to_target = self.bytes_to_client = 0
        self._rng = random.Random(seed)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    async def start(self) -> str:
        """Listen on a free port; returns host:port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Break every connection and stop to listen."""
        if self._server is not None:
            self._server.close()
        await self.reset()

    def stall(self) -> None:
        """Keep everything back from now on."""
        self._flowing.clear()

    def resume(self) -> None:
        """Let it go again, nothing lost."""
        self._flowing.set()

    async def reset(self) -> None:
        """RST on both sides of every connection."""
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_open(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.num_accepted += 1
        writers = self._connections[task] = [writer]
        ways: list[asyncio.Task[None]] = []
        try:
            await self._flowing.wait()
            target_reader, target_writer = await asyncio.open_connection(*self.target)
            writers.append(target_writer)
            ways = [
                asyncio.create_task(self._copy(reader, target_writer, to_target=True)),
                asyncio.create_task(self._copy(target_reader, writer, to_target=False)),
            ]
            await asyncio.gather(*ways)
        except (OSError, EOFError, asyncio.CancelledError):
            for each in writers:
                _abort(each)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for each in writers:
                each.close()
            del self._connections[task]

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_target: bool) -> None:
        """One way, until its sender closes it; the other way may go on."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE_CHUNKS)
        reading = asyncio.create_task(self._read(reader, chunks))
        loop = asyncio.get_running_loop()
        passed = 0
        try:
            while True:
                due_s, data = await chunks.get()
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                await self._flowing.wait()
                if not data:
                    if reading.done():
                        reading.result()
                    writer.write_eof()
                    return
                limit = self.cut_after_bytes if to_target else None
                if limit is not None and passed + len(data) >= limit:
                    self.cut_after_bytes = None
                    self.num_cut += 1
                    writer.write(data[: max(0, limit - passed)])
                    await writer.drain()
                    raise EOFError("cut")
                writer.write(data)
                await writer.drain()
                passed += len(data)
                if to_target:
                    self.bytes_to_target += len(data)
                else:
                    self.bytes_to_client += len(data)
        finally:
            reading.cancel()

    async def _read(self, reader: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Puts chunks with the time they are due; an empty one is the end. Never earlier than the one before."""
        loop, due_s = asyncio.get_running_loop(), 0.0
        try:
            data = b"-"
            while data:
                data = await reader.read(CHUNK_BYTES)
                late_s = self.delay_s + self._rng.uniform(-self.jitter_s, self.jitter_s)
                due_s = max(due_s, loop.time() + late_s)
                await chunks.put((due_s, data))
        except OSError:
            await chunks.put((due_s, b""))
            raise


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
