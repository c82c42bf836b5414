"""What goes wrong on a stage's streams, over real sockets: malformed frames, payloads that never come, clients that cancel."""

from __future__ import annotations

import asyncio
import struct
import sys
from pathlib import Path

import grpc
import pytest
from engine_helpers import NUM_LAYERS, until
from stage_server_helpers import LAST, WideRunner, push, refusal, result, running, send_hidden, step

MAX_UINT32 = (1 << 32) - 1


def preamble(
    epoch: int,
    kind: int = 1,
    *,
    magic: int = 0x4C53,
    version: int = 1,
    header: int = 0,
    trace: int = 0,
    payload: int = 0,
) -> bytes:
    """See stages/server/frames.py."""
    return struct.pack("<HBBB3xQQIIQ", magic, version, kind, 1, epoch, 1, header, trace, payload)


GOOD = step(1).SerializeToString()
MALFORMED_FRAMES = {
    "empty message": lambda epoch: [b""],
    "half a preamble": lambda epoch: [preamble(epoch)[:20]],
    "bad magic": lambda epoch: [preamble(epoch, magic=0x1234, header=len(GOOD)) + GOOD],
    "another version": lambda epoch: [preamble(epoch, version=2, header=len(GOOD)) + GOOD],
    "unknown kind": lambda epoch: [preamble(epoch, 9, header=len(GOOD)) + GOOD],
    "kind zero": lambda epoch: [preamble(epoch, 0, header=len(GOOD)) + GOOD],
    "data without a step": lambda epoch: [preamble(epoch, 2, payload=4) + b"abcd"],
    "header longer than the message": lambda epoch: [preamble(epoch, header=len(GOOD) + 1) + GOOD],
    "header shorter than the message": lambda epoch: [preamble(epoch, header=len(GOOD) - 1) + GOOD],
    "header of 4 GiB": lambda epoch: [preamble(epoch, header=MAX_UINT32) + GOOD],
    "trace longer than the message": lambda epoch: [preamble(epoch, header=len(GOOD), trace=MAX_UINT32) + GOOD],
    "payload of 2 GiB": lambda epoch: [preamble(epoch, header=len(GOOD), payload=2 << 30) + GOOD],
    "payload of 2**64 - 1": lambda epoch: [preamble(epoch, header=len(GOOD), payload=(1 << 64) - 1) + GOOD],
    "a failed step with a payload": lambda epoch: [preamble(epoch, 3, payload=4)],
    "a step within a payload": lambda epoch: [preamble(epoch, header=len(GOOD), payload=8) + GOOD] * 2,
    "data of another step": lambda epoch: [
        preamble(epoch, header=len(GOOD), payload=8) + GOOD,
        struct.pack("<HBBB3xQQIIQ", 0x4C53, 1, 2, 1, epoch, 2, 0, 0, 4) + b"abcd",
    ],
    "data beyond the payload": lambda epoch: [
        preamble(epoch, header=len(GOOD), payload=8) + GOOD,
        preamble(epoch, 2, payload=12) + b"abcdabcdabcd",
    ],
    "empty data": lambda epoch: [preamble(epoch, header=len(GOOD), payload=8) + GOOD, preamble(epoch, 2)],
    "data shorter than it says": lambda epoch: [
        preamble(epoch, header=len(GOOD), payload=8) + GOOD,
        preamble(epoch, 2, payload=8) + b"abcd",
    ],
}


@pytest.mark.parametrize("name", MALFORMED_FRAMES)
async def test_a_malformed_frame_ends_its_stream_and_no_more(name: str) -> None:
    async with running(LAST) as stage:
        epoch = await stage.start()
        results = stage.results(epoch)
        bad = stage.forward(epoch)
        try:
            for message in MALFORMED_FRAMES[name](epoch):
                await bad.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # already refused
        assert await refusal(bad) == ("INVALID_ARGUMENT", "MALFORMED_FRAME")
        assert stage.runner.executed == []
        good = stage.forward(epoch)  # the epoch goes on
        await stage.send_one(good, epoch, 1)
        assert len((await result(results)).rows) == 1
        assert (await stage.state(), await stage.health()) == ("CONNECTED", "SERVING")
        results.cancel()
        await stage.good_step()  # and it can be claimed again


@pytest.mark.parametrize(
    "layers", [(0, NUM_LAYERS), LAST], ids=["stage 0 takes no payload", "more than the cache holds"]
)
async def test_a_payload_that_no_step_of_this_stage_can_have_is_refused_at_once(layers: tuple[int, int]) -> None:
    async with running(layers) as stage:
        epoch = await stage.start()
        forward = stage.forward(epoch)
        await forward.write(preamble(epoch, header=len(GOOD), payload=512 << 20) + GOOD)
        assert await refusal(forward, 3) == ("INVALID_ARGUMENT", "MALFORMED_FRAME")
        assert await stage.state() == "CONNECTED"


def resident_bytes() -> int:
    """Of this process, which the stage under test shares."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_a_payload_that_is_promised_and_not_sent_takes_no_memory() -> None:
    async with running(LAST, WideRunner, capacity=4096) as stage:
        epoch = await stage.start(num_blocks=4096)
        what = step(1, 16384).SerializeToString()
        before = resident_bytes()
        streams = []
        for _ in range(8):  # 256 MiB each, within what a step of this stage can have
            forward = stage.forward(epoch)
            await forward.write(preamble(epoch, header=len(what), payload=16384 * 4096 * 4) + what)
            streams.append(forward)
        await asyncio.sleep(0.3)
        assert resident_bytes() - before < 64 << 20
        assert not any(stream.done() for stream in streams)
        for stream in streams:
            stream.cancel()
        assert await stage.state() == "CONNECTED"


@pytest.mark.parametrize("cut", ["between steps", "within a payload"])
async def test_a_client_that_cancels_leaves_the_stage_as_it_was(cut: str) -> None:
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        results = last.results(epoch)
        for number in range(1, 21):
            forward = last.forward(epoch)
            if cut == "within a payload":
                await forward.write(preamble(epoch, header=len(GOOD), payload=4 * 4096) + GOOD)
                await forward.write(preamble(epoch, 2, payload=4) + b"abcd")
            else:
                await send_hidden(forward, epoch, step(number, 1), WideRunner.hidden(number, 1))
                assert (await result(results)).step_id == number
            forward.cancel()
        assert await last.state() == "CONNECTED"
        forward, number = last.forward(epoch), 1 if cut == "within a payload" else 21
        await send_hidden(forward, epoch, step(number, 1), WideRunner.hidden(number, 1))
        assert (await result(results)).step_id == number
        assert last.runner.damaged == []
        forward.cancel()
        await last.start("o")
        assert (last.server.failure, await last.health()) == (None, "SERVING")


async def test_a_client_that_cancels_while_the_queue_is_full_leaves_the_stage_claimable() -> None:
    async with running(depth=2) as stage:
        epoch = await stage.start()
        stage.runner.gate.clear()
        forward = stage.forward(epoch)
        await push(forward, epoch, [step(number) for number in range(1, 30)])
        await until(stage.runner.started.is_set)
        forward.cancel()
        await asyncio.sleep(0.1)
        stage.runner.gate.set()
        await stage.good_step()
        assert len(stage.runner.executed) <= 5  # one running, two queued, one in hand of the old epoch; the new one's
