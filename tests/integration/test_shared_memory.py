"""Stages that share memory, as processes: the same answers as over the socket, and nothing left when one is killed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from engine_helpers import collect, request, until
from stage_server_helpers import (
    FIRST,
    LAST,
    MIDDLE,
    WideRunner,
    refusal,
    result,
    running,
    send,
    send_hidden,
    step,
    wire,
    write,
)

from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, StaticDiscovery, record_at
from gateway.tokenizer import load_tokenizer
from gateway.types import ModelInfo
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.checkpoint import open_checkpoint
from stages.replica import StageReplica
from stages.server.frames import StepFrame, encode_shared
from stages.server.link import FORWARD, epoch_metadata
from stages.server.ring import OFFER, PROOF, SendRing
from stages.spec import StageSpec
from tests.tiny import save_tiny

MIB = 1 << 20


class Stages:
    """Processes of `python -m stages`, over one registry."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registry = folder, Registry()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.discovery: StaticDiscovery | None = None

    async def add(self, *layers: str, **flags: int) -> None:
        """Start one for each range and announce all."""
        started = [self._start(one, flags) for one in layers]
        for process in started:
            line = await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
            self.processes[line.split()[1].removeprefix("grpc://")] = process
        await self.announce()

    async def announce(self) -> None:
        """Tell the registry of those that run."""
        if self.discovery is not None:
            await self.discovery.stop()
        self.discovery = StaticDiscovery([*self.processes], self.registry, interval_s=0.2)
        await self.discovery.start()

    def _start(self, layers: str, flags: dict[str, int]) -> subprocess.Popen[str]:
        extra = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return subprocess.Popen(
            [sys.executable, "-m", "stages", "--model", str(self.folder), "--layers", layers, "--port", "0", "--dtype",
             "float32", "--batch-invariant", "--num-blocks", "96", "--num-threads", "1", *extra],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    async def stop(self) -> None:
        """Kill all."""
        if self.discovery is not None:
            await self.discovery.stop()
        for process in self.processes.values():
            process.kill()
            process.wait()


@asynccontextmanager
async def serving(stages: Stages) -> AsyncIterator[Engine]:
    """An engine over them."""
    checkpoint = open_checkpoint(str(stages.folder))
    engine = Engine(
        model=ModelInfo(
            name="tiny", fingerprint=checkpoint.fingerprint, max_context_tokens=400, vocab_size=checkpoint.config.vocab_size
        ),
        tokenizer=load_tokenizer(checkpoint.path),
        registry=stages.registry,
        settings=EngineSettings(lease_s=2.0, check_integrity=True, prefix_caching=False),
        fingerprint=checkpoint.fingerprint,
    )  # fmt: skip
    await engine.start()
    try:
        await asyncio.wait_for(engine.wait_ready(), 60)
        yield engine
    finally:
        await engine.stop()


def rings(pid: int) -> int:
    """How many rings a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:stageline-ring")


def asked(max_tokens: int = 40) -> list:
    """Long and short prompts, greedy and seeded."""
    return [
        request(
            [3 + (i * k) % 290 for k in range(1, 150 if i % 3 else 4)],
            max_tokens=max_tokens,
            temperature=0.9 * (i % 2),
            seed=i,
        )
        for i in range(6)
    ]


async def answers(engine: Engine, max_tokens: int = 40) -> list[list[int]]:
    """The tokens of each request, all running together."""
    return [one[0].token_ids for one in await asyncio.gather(*(collect(engine, what) for what in asked(max_tokens)))]


async def test_nothing_is_left_when_stages_that_share_memory_are_killed(tmp_path) -> None:
    """Sender and receiver in turn, in the middle of prefills and decodes; the tokens are those of a run undisturbed."""
    stages = Stages(save_tiny(tmp_path / "tiny"))
    files = os.listdir("/dev/shm")
    try:
        await stages.add("0-2", "2-4", "0-2", "2-4", shared_memory_bytes=MIB)
        async with serving(stages) as engine:
            expected = await answers(engine)
            for place in range(2):
                tasks = [asyncio.create_task(collect(engine, what)) for what in asked()]
                await asyncio.sleep(0.1)
                assert not all(task.done() for task in tasks), "kill the stage while streams run"
                victim = engine.pipelines()[0].stages[place]
                os.kill(victim.pid, signal.SIGKILL)
                stages.processes.pop(victim.address).wait()
                done = await asyncio.wait_for(asyncio.gather(*tasks), 60)
                assert [one[0].token_ids for one in done] == expected, place
            await until(engine.ready)
            pids = [stage.pid for stage in engine.pipelines()[0].stages]
            await until(lambda: [rings(pid) for pid in pids] == [1, 1])  # and none with those that are gone
        assert os.listdir("/dev/shm") == files
        await until(lambda: not any(rings(process.pid) for process in stages.processes.values()))
    finally:
        await stages.stop()


@pytest.mark.parametrize(
    ("cuts", "hidden_dtype"),
    [((0, 2, 4), None), ((0, 1, 3, 4), None), ((0, 2, 4), "fp8"), ((0, 2, 4), "int8")],
    ids=str,
)
async def test_the_same_tokens_as_over_the_socket(cuts: tuple[int, ...], hidden_dtype: str | None, tmp_path) -> None:
    """No ring, one too small for a prefill, and one with room for all."""
    stages, answered = Stages(save_tiny(tmp_path / "tiny")), []
    for num_bytes in (0, 8192, MIB) if hidden_dtype is None else (0, MIB):
        replicas = [
            StageReplica(
                StageSpec(model=str(stages.folder), start_layer=start, end_layer=end, dtype="float32", batch_invariant=True,
                          num_blocks=96, shared_memory_bytes=num_bytes, hidden_dtype=hidden_dtype)
            )
            for start, end in itertools.pairwise(cuts)
        ]  # fmt: skip
        try:
            for replica in replicas:
                await replica.start()
            stages.registry.set_replicas("test", [await record_at(replica.address) for replica in replicas])
            async with serving(stages) as engine:
                gc.collect()
                assert rings(os.getpid()) == (2 * (len(cuts) - 2) if num_bytes else 0)
                answered.append(await answers(engine, 10))
        finally:
            for replica in replicas:
                await replica.stop()
    assert answered[1:] == answered[:1] * (len(answered) - 1)
    gc.collect()
    assert rings(os.getpid()) == 0


async def test_a_ring_that_is_full_leaves_the_rest_to_frames_and_goes_on_when_there_is_room() -> None:
    """1 MiB a step into a ring of 2.5 MiB while the receiver does not compute: later steps come in frames, in order."""
    options = {"depth": 8, "shared_memory_bytes": 5 * MIB // 2}
    async with running(MIDDLE, WideRunner, **options) as middle, running(LAST, WideRunner, **options) as last:
        epoch = await wire(middle, last)
        last.runner.gate.clear()
        forward, results = middle.forward(epoch), last.results(epoch)
        for round_ in range(2):
            numbers = range(1 + 10 * round_, 11 + 10 * round_)
            for number in numbers:
                await send_hidden(forward, epoch, step(number, 64), WideRunner.hidden(number, 64))
            await until(lambda: middle.runner.executed[-1:] == [numbers[-1]])  # noqa: B023
            assert last.runner.executed == list(range(1, 1 + 10 * round_))
            last.runner.gate.set()
            assert [(await result(results)).step_id for _ in numbers] == list(numbers)
            last.runner.gate.clear()
        assert middle.runner.damaged == last.runner.damaged == []


async def test_two_links_to_one_stage_and_an_epoch_that_ends_in_mid_transfer() -> None:
    """The old owner's steps wait in its own ring when the new epoch begins: they are never computed, nor mixed with new ones."""
    options = {"depth": 2, "shared_memory_bytes": 8 * MIB}
    async with AsyncExitStack() as stack:
        old, new, last = [
            await stack.enter_async_context(running(layers, WideRunner, **options)) for layers in (MIDDLE, MIDDLE, LAST)
        ]
        first_epoch = await wire(old, last)
        last.runner.gate.clear()
        forward = old.forward(first_epoch)
        for number in range(1, 8):
            await send_hidden(forward, first_epoch, step(number, 64), WideRunner.hidden(number, 64))
        await until(lambda: len(old.runner.executed) >= 5)
        claiming = asyncio.create_task(wire(new, last, owner="o"))
        await asyncio.sleep(0.1)
        last.runner.gate.set()  # a claim waits for the kernel that runs
        epoch = await claiming
        assert epoch > first_epoch
        executed = list(last.runner.executed)
        assert len(executed) <= 1
        again, results = new.forward(epoch), last.results(epoch)
        for number in range(1, 21):
            await send_hidden(again, epoch, step(number, 64), WideRunner.hidden(number, 64))
            assert (await result(results)).step_id == number
        assert last.runner.executed == [*executed, *range(1, 21)]
        assert last.runner.damaged == []


@asynccontextmanager
async def offering(stage, epoch: int, ring: SendRing | None, offer: str = "") -> AsyncIterator[tuple]:
    """A Forward stream that offers a ring, and what the stage proves."""
    metadata = (*epoch_metadata(epoch, stage.incarnation), (OFFER, offer or ring.offer()))  # type: ignore[union-attr]
    call = stage.channel.stream_unary(FORWARD)(metadata=metadata)
    proof = dict(await asyncio.wait_for(call.initial_metadata(), 5))[PROOF]
    yield call, proof
    call.cancel()


def hidden_bytes(number: int, tokens: int) -> bytes:
    return WideRunner.hidden(number, tokens).numpy().tobytes()


def hidden_frame(epoch: int, number: int) -> StepFrame:
    """Step `number` of four tokens."""
    what, raw = step(number, 4).SerializeToString(), hidden_bytes(number, 4)
    return StepFrame(epoch, number, what, b"", pb.ELEMENT_TYPE_FLOAT32, raw)


async def test_a_hostile_sender_reads_and_writes_nothing_that_was_not_put_into_its_ring() -> None:
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        results, number = last.results(epoch), 1
        frame, raw = hidden_frame(epoch, number), hidden_bytes(number, 4)
        for position in (1 << 20, 1 << 62, (1 << 64) - 64, 64 * 1024 - 64, 8):
            ring = SendRing(64 << 10)
            async with offering(last, epoch, ring) as (call, proof):
                assert ring.settle(proof)
                await call.write(encode_shared(frame, position))
                if position % (64 << 10) + len(raw) <= 64 << 10 and position < 1 << 63 and position % 64 == 0:
                    # Ahead of what was taken, within the ring: garbage of the sender's own, but memory of the ring.
                    assert (await result(results)).step_id == number
                    number += 1
                    frame, raw = hidden_frame(epoch, number), hidden_bytes(number, 4)
                    await call.write(encode_shared(frame, position))  # the same place again: stale
                assert await refusal(call) == ("INVALID_ARGUMENT", "MALFORMED_FRAME")
        for offer in ("1/0/65536", "4194305/1/65536", "x", f"{os.getpid()}/0/65536", "1" * 4000):
            async with offering(last, epoch, None, offer) as (call, proof):
                assert proof == ""
                await call.write(encode_shared(frame, 0))
                assert await refusal(call) == ("INVALID_ARGUMENT", "MALFORMED_FRAME")
        ring = SendRing(MIB)
        async with offering(last, epoch, ring) as (call, proof):
            assert ring.settle(proof)
            position = ring.reserve(len(raw))
            assert position is not None
            ring.fill(position, raw)
            last.runner.damaged.clear()
            await call.write(encode_shared(frame, position))
            assert (await result(results)).step_id == number
            assert last.runner.damaged == []
            await until(lambda: int(ring._done_1[0]) == position + len(raw))


class Liar:
    """A stage that claims to share memory it has not seen, and takes the steps that come."""

    def __init__(self, proof: str) -> None:
        self.proof, self.messages = proof, []
        self.server = grpc.aio.server()
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        handlers = {"Forward": grpc.stream_unary_rpc_method_handler(self._forward)}
        service = FORWARD.split("/")[1]
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    async def _forward(self, requests, context) -> bytes:
        await context.send_initial_metadata(((PROOF, self.proof),))
        async for message in requests:
            self.messages.append(message)
        return b""


@pytest.mark.parametrize("proof", ["", "00" * 32, "nonsense"])
async def test_a_stage_without_the_right_token_gets_frames(proof: str, caplog) -> None:
    caplog.set_level(logging.INFO, "stages.server.link")
    liar = Liar(proof)
    await liar.server.start()
    try:
        async with running(FIRST, WideRunner) as first:
            epoch = (await first.claim()).epoch
            await first.connect(epoch, address=liar.address, epoch=epoch, incarnation="i")
            await send(first.forward(epoch), epoch, step(1, 64))
            await until(lambda: len(liar.messages) == 2)  # the step, and its 1 MiB
            assert np.frombuffer(liar.messages[1][-MIB:], np.float32).tobytes() == hidden_bytes(1, 64)
            assert f"hidden states to {liar.address} go in frames" in caplog.text
    finally:
        await liar.server.stop(None)


async def test_stages_that_get_less_memory_than_asked_serve_over_the_socket() -> None:
    """The system refuses a file of this size, as a full one would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with (
        running(FIRST, WideRunner, shared_memory_bytes=64 * MIB) as first,
        running(LAST, WideRunner, shared_memory_bytes=64 * MIB) as last,
    ):
        gc.collect()
        mapped = rings(os.getpid())
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 * MIB, before[1]))
        try:
            epoch = await wire(first, last)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert rings(os.getpid()) == mapped
        forward, results = first.forward(epoch), last.results(epoch)
        await send(forward, epoch, step(1, 64))
        assert (await result(results)).step_id == 1
        assert last.runner.damaged == []


async def test_a_sender_that_dies_in_mid_step_leaves_a_stage_that_serves_the_next_one() -> None:
    """The payload is in the ring, the frame that names it never comes."""
    gc.collect()
    before = rings(os.getpid())  # what other tests of this process may hold
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        results = last.results(epoch)
        for number in range(1, 4):
            ring = SendRing(4 * MIB)
            async with offering(last, epoch, ring) as (_, proof):
                assert ring.settle(proof)
                ring.fill(ring.reserve(MIB) or 0, hidden_bytes(number, 64))
            await write(forward := last.forward(epoch), StepFrame(
                epoch, number, step(number, 64).SerializeToString(), b"", pb.ELEMENT_TYPE_FLOAT32, hidden_bytes(number, 64)
            ))  # fmt: skip
            assert (await result(results)).step_id == number
            forward.cancel()
            del ring
        await until(lambda: rings(os.getpid()) <= before)  # not for the collector: it may come late
        assert last.runner.executed == [1, 2, 3]
        assert last.runner.damaged == []
