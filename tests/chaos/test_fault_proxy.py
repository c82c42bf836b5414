"""The fault proxy does what it says; else the chaos tests would prove nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from fault_proxy import FaultProxy


class Echo:
    """A server that answers every byte and notes how its connections ended."""

    def __init__(self) -> None:
        self.received = 0
        self.endings: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.received += len(data)
                writer.write(data)
                await writer.drain()
            self.endings.append("closed")
        except ConnectionResetError:
            self.endings.append("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, FaultProxy, str, int]]:
    behind = Echo()
    server = await asyncio.start_server(behind.serve, "127.0.0.1", 0)
    proxy = FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1])
    host, _, port = (await proxy.start()).partition(":")
    yield behind, proxy, host, int(port)
    await proxy.stop()
    server.close()
    assert proxy.num_open == 0


async def trip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes = b"ping") -> float:
    """Seconds until the echo of `data` is there."""
    began = time.monotonic()
    writer.write(data)
    assert await asyncio.wait_for(reader.readexactly(len(data)), 10) == data
    return time.monotonic() - began


async def test_without_faults_bytes_pass_and_an_end_passes_too(echo) -> None:
    behind, proxy, host, port = echo
    reader, writer = await asyncio.open_connection(host, port)
    data = bytes(range(256)) * (1 << 14)  # 4 MiB
    await trip(reader, writer, data)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert (behind.received, proxy.bytes_to_target, proxy.bytes_to_client) == (len(data),) * 3
    assert behind.endings == ["closed"]
    writer.close()


async def test_delay_and_jitter_keep_the_order(echo) -> None:
    _, proxy, host, port = echo
    reader, writer = await asyncio.open_connection(host, port)
    await trip(reader, writer)
    proxy.delay_s = proxy.jitter_s = 0.05
    took = [await trip(reader, writer) for _ in range(10)]
    assert sum(took) / 10 > 0.05  # two ways of 50 ms each on average; never faster than nothing
    assert len({round(each, 2) for each in took}) > 2
    began = time.monotonic()
    for number in range(200):
        writer.write(number.to_bytes(4, "little"))
        await asyncio.sleep(0)
    got = await asyncio.wait_for(reader.readexactly(800), 5)
    assert got == b"".join(number.to_bytes(4, "little") for number in range(200))
    assert time.monotonic() - began < 5  # 200 times 50 ms, one after the other, would be 10 s
    writer.close()


async def test_a_stall_keeps_bytes_and_connections_back_and_loses_none(echo) -> None:
    behind, proxy, host, port = echo
    reader, writer = await asyncio.open_connection(host, port)
    await trip(reader, writer)
    proxy.stall()
    writer.write(b"later")
    other_reader, other_writer = await asyncio.open_connection(host, port)
    other_writer.write(b"other")
    await asyncio.sleep(0.2)
    assert behind.received == 4
    proxy.resume()
    assert await asyncio.wait_for(reader.readexactly(5), 5) == b"later"
    assert await asyncio.wait_for(other_reader.readexactly(5), 5) == b"other"
    writer.close()
    other_writer.close()


async def test_a_reset_breaks_both_sides_and_the_next_connection_works(echo) -> None:
    behind, proxy, host, port = echo
    reader, writer = await asyncio.open_connection(host, port)
    await trip(reader, writer)
    await proxy.reset()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    async with asyncio.timeout(5):
        while not behind.endings:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert behind.endings == ["reset"]
    reader, writer = await asyncio.open_connection(host, port)
    await trip(reader, writer)
    writer.close()


@pytest.mark.parametrize("limit", [1, 100_000, 1 << 20])
async def test_a_cut_comes_at_its_byte_and_once(echo, limit: int) -> None:
    behind, proxy, host, port = echo
    proxy.cut_after_bytes = limit
    reader, writer = await asyncio.open_connection(host, port)
    with pytest.raises((ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError)):
        await trip(reader, writer, b"x" * (2 << 20))
    assert proxy.num_cut == 1
    assert behind.received <= limit
    reader, writer = await asyncio.open_connection(host, port)
    await trip(reader, writer, b"x" * (2 << 20))
    assert proxy.num_cut == 1
    writer.close()


async def test_a_target_that_is_gone_is_a_reset(echo) -> None:
    proxy = FaultProxy("127.0.0.1", 1)
    host, _, port = (await proxy.start()).partition(":")
    reader, _ = await asyncio.open_connection(host, int(port))
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    await proxy.stop()
