"""What goes wrong on a stage's data path, over real sockets: bad steps, bad frames, failing kernels, dead neighbours."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine_helpers import NUM_LAYERS, VOCAB_SIZE, until
from stage_server_helpers import (
    FIRST,
    LAST,
    MIDDLE,
    RecordingRunner,
    WideRunner,
    ending,
    int32,
    push,
    refusal,
    result,
    running,
    send,
    send_hidden,
    step,
    wire,
    write,
)

from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.server.frames import StepFrame
from stages.server.link import DATA_SERVICE, OPTIONS, RESULTS, epoch_metadata
from tests.tiny import save_tiny

MAX_UINT32 = (1 << 32) - 1
GREEDY = pb.Sampling(top_p=1.0, repetition_penalty=1.0)


def one_row(token_ids: bytes = int32(1), **row: Any) -> bytes:
    row = {"sequence_id": 1, "num_tokens": 1, "context_len": 1, "block_table": int32(0), "sampling": GREEDY, **row}
    return pb.Step(step_id=1, token_ids=token_ids, rows=[pb.Row(**row)]).SerializeToString()


MALFORMED_STEPS = {
    "garbage": b"\xff\xff\xff",
    "cut off": step(1, 8).SerializeToString()[:-3],
    "zero rows": pb.Step(step_id=1, token_ids=int32(1)).SerializeToString(),
    "empty": b"",
    "row of zero tokens": one_row(b"", num_tokens=0),
    "num_tokens 2**31": one_row(num_tokens=1 << 31, context_len=1 << 31),
    "num_tokens 2**32 - 1": one_row(num_tokens=MAX_UINT32, context_len=MAX_UINT32),
    "context 2**31 - 1, small table": pb.Step(
        step_id=1,
        token_ids=int32(*[1] * 64),
        rows=[pb.Row(sequence_id=i, num_tokens=1, context_len=(1 << 31) - 1) for i in range(64)],
    ).SerializeToString(),
    "context 2**32 - 1": one_row(context_len=MAX_UINT32),
    "context under num_tokens": one_row(int32(1, 2), num_tokens=2, context_len=1),
    "context of zero": one_row(context_len=0),
    "more context than the cache": one_row(context_len=257, block_table=int32(*range(64), 0)),
    "token -1": one_row(int32(-1)),
    "token out of the vocabulary": one_row(int32(VOCAB_SIZE)),
    "token -2**31": one_row(int32(-(1 << 31))),
    "fewer tokens than rows say": one_row(b""),
    "more tokens than rows say": one_row(int32(1, 2)),
    "tokens in half an int32": one_row(b"\x01\x00"),
    "block -1": one_row(block_table=int32(-1)),
    "block out of the cache": one_row(block_table=int32(64)),
    "block 2**31 - 1": one_row(block_table=int32((1 << 31) - 1)),
    "table too short": one_row(block_table=b""),
    "table too long": one_row(block_table=int32(0, 1)),
    "decode row after a prefill row": pb.Step(
        step_id=1,
        token_ids=int32(1, 2, 3),
        rows=[
            pb.Row(sequence_id=1, num_tokens=2, context_len=2, block_table=int32(0)),
            pb.Row(sequence_id=2, num_tokens=1, context_len=1, block_table=int32(1)),
        ],
    ).SerializeToString(),
}


@pytest.mark.parametrize("layers", [(0, NUM_LAYERS), (1, NUM_LAYERS)], ids=["whole", "last"])
async def test_malformed_steps_are_answered_and_the_epoch_goes_on(layers: tuple[int, int]) -> None:
    async with running(layers) as stage:
        epoch = await stage.start()
        forward, results = stage.forward(epoch), stage.results(epoch)
        payload = b"" if layers[0] == 0 else b"\0" * 4
        for number, (name, header) in enumerate(MALFORMED_STEPS.items()):
            await write(forward, StepFrame(epoch, 2 * number + 1, header, b"", 1 if payload else 0, payload))
            answer = await result(results)
            assert (answer.step_id, answer.error.reason, len(answer.rows)) == (2 * number + 1, "MALFORMED_STEP", 0), (
                name
            )
            assert answer.error.stage == f"{layers[0]}-{layers[1]}"
            assert answer.error.message
            await send(forward, epoch, step(2 * number + 2), payload, 1 if payload else 0)
            answer = await result(results)
            assert (answer.step_id, answer.HasField("error"), len(answer.rows)) == (2 * number + 2, False, 1), name
        assert stage.runner.executed == [2 * n + 2 for n in range(len(MALFORMED_STEPS))]
        assert (stage.server.failure, await stage.state(), await stage.health()) == (None, "CONNECTED", "SERVING")
        assert (await stage.renew(epoch)).last_executed_step == 2 * len(MALFORMED_STEPS)


async def test_hidden_states_of_another_size_or_type_are_answered() -> None:
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        forward, results = last.forward(epoch), last.results(epoch)
        right = WideRunner.hidden(1, 2).numpy().tobytes()
        wrong = [
            (b"", pb.ELEMENT_TYPE_FLOAT32),
            (right[:-4], pb.ELEMENT_TYPE_FLOAT32),
            (right[:-1], pb.ELEMENT_TYPE_FLOAT32),
            (right + right, pb.ELEMENT_TYPE_FLOAT32),
            (right, pb.ELEMENT_TYPE_BFLOAT16),
            (right, pb.ELEMENT_TYPE_UNSPECIFIED),
            (right, 255),
        ]
        for number, (payload, element_type) in enumerate(wrong, 1):
            await send(forward, epoch, step(number, 2), payload, element_type)
            answer = await result(results)
            assert (answer.step_id, answer.error.reason) == (number, "HIDDEN_STATES_MISMATCH")
        good = len(wrong) + 1
        await send_hidden(forward, epoch, step(good, 2), WideRunner.hidden(good, 2))
        assert not (await result(results)).HasField("error")
        assert (last.runner.executed, last.runner.damaged) == ([good], [])


FAULTS = [ValueError("v"), KeyError("k"), MemoryError("m"), IndexError(), AssertionError("a"), RecursionError("r")]


@pytest.mark.parametrize("failing", range(3), ids=["first", "middle", "last"])
async def test_a_kernel_that_fails_is_answered_in_the_order_of_steps(failing: int) -> None:
    async with running(FIRST) as first, running(MIDDLE) as middle, running(LAST) as last:
        stages = (first, middle, last)
        epoch = await wire(*stages)
        forward, results = first.forward(epoch), last.results(epoch)
        stages[failing].runner.faults = {2 * n + 2: fault for n, fault in enumerate(FAULTS)}
        for number in range(1, 2 * len(FAULTS) + 2):
            await send(forward, epoch, step(number))
        for number in range(1, 2 * len(FAULTS) + 2):
            answer = await result(results)
            assert answer.step_id == number
            if number % 2:
                assert (answer.HasField("error"), len(answer.rows)) == (False, 1)
            else:
                fault = FAULTS[number // 2 - 1]
                assert (answer.error.reason, len(answer.rows)) == ("STEP_FAILED", 0)
                assert type(fault).__name__ in answer.error.message
                assert answer.error.stage == str(stages[failing].runner.layers)
        for stage in stages:
            assert (stage.server.failure, await stage.health()) == (None, "SERVING")


async def test_sampling_that_makes_no_sense_is_answered() -> None:
    nan = float("nan")
    asked = [
        pb.Sampling(temperature=nan, top_p=1.0, repetition_penalty=1.0),
        pb.Sampling(temperature=1.0, top_p=nan, repetition_penalty=1.0),
        pb.Sampling(temperature=-1.0, top_p=1.0, repetition_penalty=1.0),
        pb.Sampling(temperature=1.0, top_p=1.0, repetition_penalty=0.0),
        pb.Sampling(temperature=1.0, top_k=MAX_UINT32, top_p=1.0, repetition_penalty=1.0),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, num_logprobs=MAX_UINT32, logprobs=True),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, suppressed_token_ids=[MAX_UINT32]),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, bias_token_ids=[1, 2], bias_values=[1.0]),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, bias_token_ids=[VOCAB_SIZE], bias_values=[1.0]),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, allowed_token_bitmask=b"\xff"),
        pb.Sampling(top_p=1.0, repetition_penalty=1.2, registration=pb.Registration(prompt_token_ids=b"\x01\x02")),
        pb.Sampling(top_p=1.0, repetition_penalty=1.2, registration=pb.Registration(prompt_token_ids=int32(-7))),
        pb.Sampling(top_p=1.0, repetition_penalty=1.2, registration=pb.Registration(output_token_ids=int32(1 << 30))),
    ]
    async with running() as stage:
        epoch = await stage.start()
        forward, results = stage.forward(epoch), stage.results(epoch)
        for number, sampling in enumerate(asked, 1):
            what = step(2 * number - 1)
            what.rows[0].sampling.CopyFrom(sampling)
            await send(forward, epoch, what)
            answer = await result(results)
            assert answer.step_id == 2 * number - 1
            assert answer.HasField("error") or len(answer.rows) == 1
            await send(forward, epoch, step(2 * number))
            assert len((await result(results)).rows) == 1
        assert stage.server.failure is None


async def test_scoring_that_makes_no_sense_is_refused() -> None:
    asked = [
        pb.Scoring(num_logprobs=1),
        pb.Scoring(target_ids=b"\x01\x02"),
        pb.Scoring(target_ids=int32(1, 2, 3)),
        pb.Scoring(target_ids=int32(1), first_token=2),
        pb.Scoring(target_ids=int32(1), first_token=MAX_UINT32),
        pb.Scoring(target_ids=int32(VOCAB_SIZE)),
        pb.Scoring(target_ids=int32(-1)),
        pb.Scoring(target_ids=int32(1), num_logprobs=MAX_UINT32),
    ]
    async with running() as stage:
        epoch = await stage.start()
        forward, results = stage.forward(epoch), stage.results(epoch)
        for number, scoring in enumerate(asked, 1):
            what = step(2 * number - 1, 2)
            what.rows[0].scoring.CopyFrom(scoring)
            await send(forward, epoch, what)
            assert (await result(results)).error.reason == "MALFORMED_STEP"
            what = step(2 * number, 2)
            what.rows[0].scoring.CopyFrom(pb.Scoring(target_ids=int32(1, 2), num_logprobs=3))
            await send(forward, epoch, what)
            (row,) = (await result(results)).rows
            assert (len(row.scores.logprobs), len(row.scores.ranks), len(row.scores.top_ids)) == (8, 8, 24)
            assert row.candidate_ids  # and it was sampled too


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
