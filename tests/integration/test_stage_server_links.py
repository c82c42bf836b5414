"""A stage's link to its neighbour, over real sockets: replaced, stale, given up, refused, and of a neighbour that dies."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import grpc
import pytest
from engine_helpers import NUM_LAYERS, until
from stage_server_helpers import (
    FIRST,
    RecordingRunner,
    WideRunner,
    ending,
    refusal,
    result,
    running,
    send,
    step,
    wire,
)

from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.server.link import DATA_SERVICE, OPTIONS, RESULTS, epoch_metadata
from tests.tiny import save_tiny


class Neighbour:
    """Answers Forward as a stage would and notes what comes: (metadata, messages, how it ended)."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.ended: list[str] = []
        self.messages: list[tuple[str, bytes]] = []
        self.server = grpc.aio.server(options=OPTIONS)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"
        handlers = {"Forward": grpc.stream_unary_rpc_method_handler(self._forward)}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(DATA_SERVICE, handlers),))

    async def _forward(self, requests: Any, context: Any) -> bytes:
        name = dict(context.invocation_metadata())["stageline-incarnation"]
        self.opened.append(name)
        await context.send_initial_metadata(())  # shares no memory
        try:
            async for message in requests:
                self.messages.append((name, message))
        finally:
            self.ended.append(name)
        return b""


async def test_connecting_again_replaces_the_link_and_closes_the_old_one() -> None:
    old, new = Neighbour(), Neighbour()
    await old.server.start()
    await new.server.start()
    try:
        async with running(FIRST) as stage:
            epoch = (await stage.claim()).epoch
            await stage.connect(epoch, address=old.address, epoch=epoch, incarnation="old")
            watch = await stage.watch(epoch)
            forward = stage.forward(epoch)
            await send(forward, epoch, step(1))
            await until(lambda: [name for name, _ in old.messages] == ["old"] * 2)
            await stage.connect(epoch, address=new.address, epoch=epoch, incarnation="new")
            await until(lambda: old.ended == ["old"], 2)
            await send(forward, epoch, step(2))
            await until(lambda: [name for name, _ in new.messages] == ["new"] * 2)
            assert len(old.messages) == 2
            for _ in range(10):
                await stage.connect(epoch, address=new.address, epoch=epoch, incarnation="new")
            await until(lambda: len(new.ended) == len(new.opened) - 1, 2)
            reading = asyncio.ensure_future(watch.read())
            done, _ = await asyncio.wait({reading}, timeout=0.3)
            assert not done, "a link that was replaced is not a broken one"
            watch.cancel()
    finally:
        await old.server.stop(None)
        await new.server.stop(None)


async def test_the_link_ends_with_its_epoch() -> None:
    neighbour = Neighbour()
    await neighbour.server.start()
    try:
        async with running(FIRST) as stage:
            for end in ("release", "claim", "expiry"):
                epoch = (await stage.claim(lease_s=0.4 if end == "expiry" else 30.0)).epoch
                await stage.connect(epoch, address=neighbour.address, epoch=epoch, incarnation=end)
                await until(lambda: end in neighbour.opened)  # noqa: B023
                if end == "release":
                    await stage.release(epoch)
                elif end == "claim":
                    await stage.claim()
                await until(lambda: end in neighbour.ended, 2)  # noqa: B023
    finally:
        await neighbour.server.stop(None)


async def test_a_stale_connect_never_replaces_the_link_of_a_newer_epoch() -> None:
    """It waits for a neighbour that accepts and says nothing, and then for one that comes up late."""
    with socket.socket() as silent, socket.socket() as late:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        late.bind(("127.0.0.1", 0))
        for waiting in (silent, late):
            address = f"127.0.0.1:{waiting.getsockname()[1]}"
            async with running(FIRST) as first, running((1, NUM_LAYERS)) as last:
                stale = (await first.claim()).epoch
                connecting = asyncio.create_task(
                    refusal(first.connect(stale, address=address, epoch=stale, incarnation="stale"))
                )
                await asyncio.sleep(0.3)
                assert not connecting.done()
                epoch = await wire(first, last)
                assert await asyncio.wait_for(connecting, 2) == ("FAILED_PRECONDITION", "STALE_EPOCH")
                if waiting is late:
                    late.listen()
                    await asyncio.sleep(0.3)
                forward, results = first.forward(epoch), last.results(epoch)
                await send(forward, epoch, step(1))
                assert len((await result(results)).rows) == 1
                assert await first.state() == "CONNECTED"


class SlowAllocation(RecordingRunner):
    """Takes half a second to make a KV cache."""

    def allocate_kv(self, num_blocks: int) -> None:
        time.sleep(0.5)
        super().allocate_kv(num_blocks)


async def test_a_stale_connect_that_waits_for_memory_does_not_change_the_newer_cache() -> None:
    async with running(kind=SlowAllocation) as stage:
        stale = (await stage.claim()).epoch
        connecting = asyncio.create_task(refusal(stage.connect(stale, num_blocks=8)))
        await asyncio.sleep(0.1)
        epoch = (await stage.claim()).epoch
        await stage.connect(epoch, num_blocks=16)
        assert await connecting == ("FAILED_PRECONDITION", "STALE_EPOCH")
        assert stage.runner.num_blocks == 16
        forward, results = stage.forward(epoch), stage.results(epoch)
        await send(forward, epoch, step(1, 48))
        assert len((await result(results)).rows) == 1


async def test_a_connect_that_its_owner_gives_up_leaves_the_claim_as_it_was() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        async with running(FIRST) as first, running((1, NUM_LAYERS)) as last:
            epoch = (await first.claim()).epoch
            nobody = first.connect(epoch, timeout_s=0.5, address=address, epoch=1, incarnation="x")
            assert (await refusal(nobody))[0] == "DEADLINE_EXCEEDED"
            assert await first.state() == "CLAIMED"
            await first.renew(epoch)
            epoch = await wire(first, last)
            forward, results = first.forward(epoch), last.results(epoch)
            await send(forward, epoch, step(1))
            assert len((await result(results)).rows) == 1


async def test_a_neighbour_that_refuses_the_stream_breaks_the_link() -> None:
    async with running(FIRST) as first, running((1, NUM_LAYERS)) as last:
        epoch = await wire(first, last)
        watch = await first.watch(epoch)
        await last.claim("o")  # a new epoch there: the stream from here is stale
        event = await asyncio.wait_for(watch.read(), 2)
        assert event.link_broken.address == last.address
        assert "STALE_EPOCH" in event.link_broken.detail or "not current" in event.link_broken.detail
        assert await first.state() == "CONNECTED"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("neighbour") / "tiny")


async def test_kill_9_of_a_neighbour_is_told_within_a_second(folder) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "stages", "--model", str(folder), "--layers", "1-4", "--port", "0", "--dtype", "float32"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        address = line.split()[1].removeprefix("grpc://")
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        stub = pb_grpc.StageServiceStub(channel)
        incarnation = (await stub.Describe(pb.DescribeRequest())).incarnation

        class Wide64(WideRunner):
            WIDTH = 64

        async with running(FIRST, Wide64) as first:
            granted = await stub.Claim(pb.ClaimRequest(owner_id="o", incarnation=incarnation, lease_s=30))
            epoch = (await first.claim(min_epoch=granted.epoch)).epoch
            assert epoch == granted.epoch
            await stub.Connect(pb.ConnectRequest(epoch=epoch, num_blocks=8))
            await first.connect(epoch, num_blocks=8, address=address, epoch=epoch, incarnation=incarnation)
            results = channel.unary_stream(RESULTS)(b"", metadata=epoch_metadata(epoch, incarnation))
            forward = first.forward(epoch)
            await send(forward, epoch, step(1, 4))
            answer = await result(results)
            assert (answer.error.message, [t.stage for t in answer.timings]) == ("", ["0-1", "1-4"])
            watch = await first.watch(epoch)
            process.send_signal(signal.SIGKILL)
            event = await asyncio.wait_for(watch.read(), 1.0)
            assert event.link_broken.address == address
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asyncio.wait_for(results.read(), 1.0)
            assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
            # The stage that lives goes on: it takes steps of this epoch and can be claimed for the next pipeline.
            await send(forward, epoch, step(2, 4))
            await until(lambda: first.runner.executed == [1, 2])
            assert await first.state() == "CONNECTED"
            again = await first.claim()
            assert (again.previous_epoch, again.last_executed_step) == (epoch, 2)
            assert (await ending(watch)) == ("FAILED_PRECONDITION", "STALE_EPOCH")
        await channel.close()
    finally:
        process.kill()
        process.wait(timeout=10)
