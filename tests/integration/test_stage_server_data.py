"""The data streams of a stage over real sockets: large payloads, order, flow control, who may read answers."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from engine_helpers import NUM_LAYERS, expected_tokens, until
from stage_server_helpers import (
    FIRST,
    LAST,
    MIDDLE,
    WideRunner,
    push,
    refusal,
    result,
    running,
    send,
    send_hidden,
    step,
    wire,
)

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.server.frames import StepFrame, encode
from stages.spec import DEFAULT_SHARED_MEMORY_BYTES

NUM_BLOCKS = 512


@pytest.mark.parametrize("shared_memory_bytes", [0, DEFAULT_SHARED_MEMORY_BYTES])
async def test_32_mib_of_hidden_states_cross_two_hops_intact(shared_memory_bytes: int) -> None:
    options = {"capacity": NUM_BLOCKS, "shared_memory_bytes": shared_memory_bytes}
    async with (
        running(FIRST, WideRunner, **options) as first,
        running(MIDDLE, WideRunner, **options) as middle,
        running(LAST, WideRunner, **options) as last,
    ):
        epoch = await wire(first, middle, last, num_blocks=NUM_BLOCKS)
        forward, results = first.forward(epoch), last.results(epoch)
        await send(forward, epoch, step(1, 2048))
        answer = await result(results, 60)
        assert (answer.step_id, answer.error.reason, len(answer.rows)) == (1, "", 1)
        assert middle.runner.executed == last.runner.executed == [1]
        assert middle.runner.damaged == last.runner.damaged == []
        assert [timing.stage for timing in answer.timings] == ["0-1", "1-2", f"2-{NUM_LAYERS}"]
        assert all(t.received_ns <= t.started_ns <= t.finished_ns for t in answer.timings)


async def test_200_steps_come_back_in_order_past_a_slow_last_stage() -> None:
    async with (
        running(FIRST, depth=4) as first,
        running(MIDDLE, depth=4) as middle,
        running(LAST, depth=4, delay_s=0.003) as last,
    ):
        epoch = await wire(first, middle, last)
        forward, results = first.forward(epoch), last.results(epoch)

        async def write() -> None:
            for number in range(1, 201):
                await send(forward, epoch, step(number, 1 + number % 7, token=number))

        writing = asyncio.create_task(write())
        for number in range(1, 201):
            answer = await result(results)
            prompt = [number] * (1 + number % 7)
            assert answer.step_id == number
            ids = np.frombuffer(answer.rows[0].candidate_ids, dtype="<i4")
            assert ids[0] == expected_tokens(prompt, 1, num_stages=3)[0]
        await writing
        assert first.runner.executed == middle.runner.executed == last.runner.executed == list(range(1, 201))


@pytest.mark.parametrize("shared_memory_bytes", [0, 16 << 20])
async def test_a_stage_that_stands_still_holds_the_sender_back(shared_memory_bytes: int) -> None:
    """1 MiB a step into a stage whose neighbour does not finish one: memory holds queues and windows, not all steps."""
    total, sent = 200, 0
    options = {"depth": 4, "shared_memory_bytes": shared_memory_bytes}
    async with running(MIDDLE, WideRunner, **options) as middle, running(LAST, WideRunner, **options) as last:
        epoch = await wire(middle, last)
        last.runner.gate.clear()
        forward, results = middle.forward(epoch), last.results(epoch)

        async def write() -> None:
            nonlocal sent
            for number in range(1, total + 1):
                await send_hidden(forward, epoch, step(number, 64), WideRunner.hidden(number, 64))
                sent = number

        writing = asyncio.create_task(write())
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.5)
        # 4 in and 4 out of the middle, 4 into the last, one in each hand; then the ring and two flow control windows of 8 MiB or more.
        assert 12 <= sent <= 80
        assert not forward.done()
        assert len(middle.runner.executed) <= sent
        last.runner.gate.set()
        assert [(await result(results)).step_id for _ in range(total)] == list(range(1, total + 1))
        await writing
        assert not forward.done()
        assert middle.runner.damaged == last.runner.damaged == []


async def test_answers_nobody_reads_wait_and_are_all_there() -> None:
    async with running(depth=2) as stage:
        epoch = await stage.start()
        forward = stage.forward(epoch)

        async def write() -> None:
            for number in range(1, 101):
                await send(forward, epoch, step(number))

        writing = asyncio.create_task(write())
        await until(lambda: len(stage.runner.executed) >= 3)
        await asyncio.sleep(0.2)
        assert len(stage.runner.executed) <= 4  # two in the outbox, one waiting for room in it, one more at most
        assert not forward.done()
        results = stage.results(epoch)
        assert [(await result(results)).step_id for _ in range(100)] == list(range(1, 101))
        await writing


@pytest.mark.parametrize("size", [1, 5, 4096, 1 << 20])
async def test_a_payload_may_come_in_frames_of_any_size(size: int) -> None:
    tokens = 64 if size > 5 else 1
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        forward, results = last.forward(epoch), last.results(epoch)
        what = step(1, tokens)
        raw = WideRunner.hidden(1, tokens).numpy().tobytes()
        frame = StepFrame(epoch, 1, what.SerializeToString(), b"", pb.ELEMENT_TYPE_FLOAT32, raw)
        head, data, *_ = encode(frame)
        await forward.write(head)
        preamble = data[: len(data) - min(len(raw), 1 << 20)]
        for start in range(0, len(raw), size):
            part = raw[start : start + size]
            await forward.write(preamble[:-8] + len(part).to_bytes(8, "little") + part)
        answer = await result(results)
        assert (answer.step_id, answer.error.reason) == (1, "")
        assert last.runner.damaged == []


async def test_a_stream_that_is_closed_ends_well_and_its_steps_are_answered() -> None:
    async with running() as stage:
        epoch = await stage.start()
        results = stage.results(epoch)
        for number in range(1, 4):
            forward = stage.forward(epoch)
            await send(forward, epoch, step(number))
            await forward.done_writing()
            assert await asyncio.wait_for(forward, 5) == b""
            assert (await result(results)).step_id == number


async def test_a_step_cut_off_in_its_payload_is_not_executed() -> None:
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        results = last.results(epoch)
        cut = last.forward(epoch)
        raw = WideRunner.hidden(1, 256).numpy().tobytes()
        messages = list(
            encode(StepFrame(epoch, 1, step(1, 256).SerializeToString(), b"", pb.ELEMENT_TYPE_FLOAT32, raw))
        )
        for message in messages[:-1]:
            await cut.write(message)
        await cut.done_writing()
        await asyncio.wait({asyncio.ensure_future(cut.code())}, timeout=5)
        assert cut.done()
        whole = last.forward(epoch)
        await send_hidden(whole, epoch, step(1, 64), WideRunner.hidden(1, 64))
        assert (await result(results)).step_id == 1
        assert last.runner.executed == [1]
        assert last.runner.damaged == []


async def test_a_step_is_taken_once_and_in_order_from_however_many_streams() -> None:
    async with running() as stage:
        epoch = await stage.start()
        results = stage.results(epoch)
        first, second = stage.forward(epoch), stage.forward(epoch)
        await send(first, epoch, step(1))
        assert (await result(results)).step_id == 1
        for wrong in (1, 3):
            other = stage.forward(epoch)
            await send(other, epoch, step(wrong))
            assert await refusal(other) == ("FAILED_PRECONDITION", "STEP_OUT_OF_ORDER")
        await send(second, epoch, step(2))
        assert (await result(results)).step_id == 2
        assert stage.runner.executed == [1, 2]


async def test_one_reader_of_answers_at_a_time() -> None:
    async with running() as stage:
        epoch = await stage.start()
        reader = stage.results(epoch)
        forward = stage.forward(epoch)
        await send(forward, epoch, step(1))
        assert (await result(reader)).step_id == 1
        assert (await refusal(stage.results(epoch).read()))[0] == "FAILED_PRECONDITION"
        await send(forward, epoch, step(2))
        assert (await result(reader)).step_id == 2
        reader.cancel()

        async def again() -> int:
            while True:  # the stage hears of the cancellation a moment later
                other = stage.results(epoch)
                await send(forward, epoch, step(3))
                try:
                    return (await result(other)).step_id
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)

        assert await asyncio.wait_for(again(), 5) == 3


async def test_results_come_from_the_last_stage_only() -> None:
    async with running(FIRST) as first, running((1, NUM_LAYERS)) as last:
        epoch = await wire(first, last)
        assert (await refusal(first.results(epoch).read()))[0] == "FAILED_PRECONDITION"


@pytest.mark.parametrize("layers", [FIRST, LAST], ids=["first", "last"])
async def test_steps_before_connect_are_refused_and_not_executed(layers: tuple[int, int]) -> None:
    async with running(layers) as stage:
        epoch = (await stage.claim()).epoch
        forward = stage.forward(epoch)
        # Few: a client that still writes when the stream is reset may hear INTERNAL from gRPC itself.
        await push(forward, epoch, [step(number) for number in range(1, 3)])
        assert await refusal(forward) == ("FAILED_PRECONDITION", "NOT_CONNECTED")
        assert await refusal(stage.results(epoch).read()) == ("FAILED_PRECONDITION", "NOT_CONNECTED")
        assert stage.runner.executed == []
        assert (await stage.renew(epoch)).last_executed_step == 0
        assert await stage.state() == "CLAIMED"


@pytest.mark.parametrize("metadata", [(), (("stageline-epoch", "one"),), (("stageline-epoch", "9" * 40),)])
async def test_a_stream_without_a_readable_epoch_is_refused(metadata) -> None:
    async with running() as stage:
        await stage.start()
        for call in (
            stage.channel.stream_unary("/stageline.stage.v1.StageDataService/Forward")(metadata=metadata),
            stage.channel.unary_stream("/stageline.stage.v1.StageDataService/Results")(b"", metadata=metadata),
        ):
            assert await asyncio.wait_for(call.code(), 5) == grpc.StatusCode.INVALID_ARGUMENT
