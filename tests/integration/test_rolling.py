"""Every stage process is replaced under load, one after the other; streams say what they would have said undisturbed."""

from __future__ import annotations

import asyncio
import inspect
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_helpers import NUM_LAYERS, expected_tokens

from stageline.client import AsyncClient, Backoff
from stageline.errors import FailedPreconditionError, StagelineError, UnavailableError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from tests.ports import free_ports

LAYERS = ((0, 2), (2, NUM_LAYERS))
SETTINGS = {"lease_s": 1.0, "canary_interval_s": 1.0}
STAGE = {"num_blocks": 512, "delay_s": 0.003}
NO_RETRY = Backoff(initial_s=1000.0, max_s=1000.0)
QUICK = Backoff(initial_s=0.02, max_s=0.2)
NUM_STREAMS = 8


@pytest.fixture(autouse=True)
def _clean(children) -> Iterator[None]:
    yield
    children.kill_all()


def gone(process: dict) -> bool:
    return not Path(f"/proc/{process['pid']}").exists()


async def until(condition, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not (await condition() if inspect.iscoroutinefunction(condition) else condition()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class Streams:
    """As many streams as there are prompts, again and again; every answer is compared with what the toy says."""

    def __init__(self, clients: list[AsyncClient], *, max_tokens: int = 100) -> None:
        self.prompts = [[7 * i + 1] * (i + 1) for i in range(NUM_STREAMS)]
        self.expected = [expected_tokens(prompt, max_tokens, num_stages=len(LAYERS)) for prompt in self.prompts]
        self.num_ended = 0
        self.faults: list[str] = []
        self.last_token_s = [time.monotonic()] * NUM_STREAMS
        self.longest_pause_s = 0.0
        self._clients, self._max_tokens, self._over = clients, max_tokens, False
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(NUM_STREAMS)]

    async def _run(self, index: int) -> None:
        while not self._over:
            generation = gen.Generation(
                token_ids=gen.TokenIds(ids=self.prompts[index]),
                sampling=gen.SamplingParams(temperature=0),
                stop=gen.StopConditions(max_tokens=self._max_tokens, ignore_eos=True),
            )
            tokens: list[int] = []
            client = self._clients[index % len(self._clients)]
            try:
                async for message in client.stream_generate(generation, timeout_s=30):
                    for delta in message.choices:
                        now_s = time.monotonic()
                        self.longest_pause_s = max(self.longest_pause_s, now_s - self.last_token_s[index])
                        self.last_token_s[index] = now_s
                        tokens += delta.token_ids
            except StagelineError as error:
                self.faults.append(f"stream {index}: {error.reason} {error.message}")
                return
            if tokens != self.expected[index]:
                self.faults.append(f"stream {index}: {len(tokens)} tokens, not as expected")
            self.num_ended += 1

    async def moved_on(self, count: int = NUM_STREAMS) -> None:
        """Return when so many more streams have ended."""
        wanted = self.num_ended + count
        await until(lambda: self.num_ended >= wanted or bool(self.faults))

    async def finish(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def pipelines(client: AsyncClient) -> list[pb.PipelineStatus]:
    return list((await client.get_model()).pipelines)


async def test_every_stage_is_replaced_and_no_request_fails(children, caplog) -> None:
    """With and without a replacement that is up before the old one goes, turn about. Clients never retry."""
    ports = free_ports(len(LAYERS) * 4)
    stages = [children.stage(*LAYERS[i % 2], port=ports[i], **STAGE) for i in range(4)]
    gateway = children.gateway([{"address": f"127.0.0.1:{port}"} for port in ports], settings=SETTINGS)
    async with AsyncClient(gateway["grpc"], backoff=NO_RETRY) as client:

        async def whole() -> bool:
            return [one.state for one in await pipelines(client)] == ["ready", "ready"]

        await until(whole)
        streams = Streams([client])
        await streams.moved_on()
        for place, old in enumerate(stages):
            late = place % 2 == 1
            if not late:
                children.stage(*LAYERS[place % 2], port=ports[4 + place], **STAGE)
                await asyncio.sleep(1.2)  # until the gateway has found it
            children.signal(old, signal.SIGTERM)
            await until(lambda old=old: gone(old))
            if late:
                await streams.moved_on(2)  # the other pipeline has it all
                children.stage(*LAYERS[place % 2], port=ports[4 + place], **STAGE)
            await until(whole)
            assert streams.faults == []
        await streams.finish()
        assert streams.faults == []
        in_use = {replica.pid for one in await pipelines(client) for stage in one.stages for replica in stage.replicas}
        assert not in_use & {stage["pid"] for stage in stages}
    assert "trying again" not in caplog.text


async def test_with_one_pipeline_requests_wait(children, caplog) -> None:
    ports = free_ports(3)
    old, _ = [children.stage(*LAYERS[i], port=ports[i], drain_s=0.5, **STAGE) for i in range(2)]
    gateway = children.gateway([{"address": f"127.0.0.1:{port}"} for port in ports], settings=SETTINGS)
    async with AsyncClient(gateway["grpc"], backoff=NO_RETRY) as client:
        streams = Streams([client])
        await streams.moved_on(3)
        children.signal(old, signal.SIGTERM)
        await until(lambda: gone(old))
        await asyncio.sleep(0.5)
        children.stage(*LAYERS[0], port=ports[2], **STAGE)
        await streams.moved_on()
        await streams.finish()
    assert streams.faults == []
    assert "trying again" not in caplog.text


async def test_of_two_gateways_one_is_killed_and_one_is_rolled(children) -> None:
    """Each owns one pipeline of the pool. What the dead one owned the other takes over; clients lose no token."""
    stages = [children.stage(*LAYERS[i % 2], **STAGE) for i in range(4)]
    settings = {**SETTINGS, "eager_pipelines": 1, "patience_s": 3.0}
    # However slow this machine is, the first leaves a pipeline to the second, which takes more later.
    gateways = [children.gateway(stages, settings={**settings, "patience_s": patience_s}) for patience_s in (1e6, 3.0)]
    addresses = [gateway["grpc"] for gateway in gateways]
    async with (
        AsyncClient(addresses, backoff=QUICK) as first,
        AsyncClient(addresses[::-1], backoff=QUICK) as second,
        AsyncClient(addresses[1]) as survivor,
    ):

        async def has_all() -> bool:
            return [one.state for one in await pipelines(survivor)] == ["ready", "ready"]

        assert [one.state for one in await pipelines(survivor)] == ["ready"]
        streams = Streams([first, second], max_tokens=50)
        await streams.moved_on()
        children.signal(gateways[0], signal.SIGKILL)
        await until(has_all, 60)
        await streams.moved_on()
        assert streams.faults == []
        await streams.finish()
        # The rolling update of a gateway: a new one comes, the old one drains and gives its pipelines back.
        new = children.gateway(stages, settings=settings, wait_ready=False)
        async with AsyncClient([addresses[1], new["grpc"]], backoff=QUICK) as moving:
            rolled = Streams([moving], max_tokens=50)
            await rolled.moved_on(3)
            children.signal(gateways[1], signal.SIGTERM)
            await until(lambda: gone(gateways[1]))
            await rolled.moved_on()
            await rolled.finish()
    assert rolled.faults == []
    assert streams.faults == []


async def test_a_gateway_whose_model_was_replaced_sends_its_clients_on(children) -> None:
    """The same addresses, other weights: new requests go on at the new gateway, a stream that had begun cannot."""
    ports = free_ports(len(LAYERS))
    stages = [children.stage(*layers, port=port, **STAGE) for layers, port in zip(LAYERS, ports, strict=True)]
    settings = {**SETTINGS, "superseded_after_s": 1.0}
    old = children.gateway(stages, settings=settings)
    generation = gen.Generation(
        token_ids=gen.TokenIds(ids=[5]), sampling=gen.SamplingParams(temperature=0), stop=gen.StopConditions(max_tokens=150)
    )  # fmt: skip
    async with AsyncClient(old["grpc"], backoff=QUICK) as alone:
        stream = alone.stream_generate(generation, timeout_s=60)
        await anext(stream)
        for stage in stages:
            children.kill(stage)
        renewed = [
            children.stage(*layers, port=port, fingerprint="new", **STAGE)
            for layers, port in zip(LAYERS, ports, strict=True)
        ]
        new = children.gateway(renewed, settings=settings, fingerprint="new")
        began_s = time.monotonic()
        async with AsyncClient(old["grpc"], backoff=NO_RETRY) as once:
            with pytest.raises(UnavailableError) as refused:
                await once.generate(generation, timeout_s=60)
        assert time.monotonic() - began_s < 5
        assert refused.value.reason == "MODEL_SUPERSEDED"  # so from now on nothing is begun here
        async with AsyncClient([old["grpc"], new["grpc"]], backoff=QUICK) as both:
            answer = await both.generate(generation, timeout_s=60)
            assert len(answer.choices[0].token_ids) == 150
            assert answer.start.model_fingerprint == "new"
        await stream.aclose()
    async with AsyncClient([old["grpc"], new["grpc"]], backoff=QUICK) as both:
        resumed = gen.Generation()
        resumed.CopyFrom(generation)
        resumed.resume.CopyFrom(gen.Resume(token_ids=[1, 2], model_fingerprint="toy", seed=0))
        with pytest.raises(FailedPreconditionError) as begin_again:
            await both.generate(resumed, timeout_s=60)
    assert begin_again.value.reason == "MODEL_FINGERPRINT_MISMATCH"


async def test_a_gateway_that_lost_its_pipelines_to_another_sends_its_clients_there(children) -> None:
    """It stands still past its leases. Its streams would wait in vain for stages that the other one keeps."""
    stages = [children.stage(*LAYERS[i], **STAGE) for i in range(2)]
    first = children.gateway(stages, settings=SETTINGS)
    second = children.gateway(stages, settings=SETTINGS, wait_ready=False)
    addresses = [first["grpc"], second["grpc"]]
    async with AsyncClient(addresses, backoff=QUICK) as client, AsyncClient(addresses[0], backoff=NO_RETRY) as stuck:
        streams = Streams([client], max_tokens=100)
        await streams.moved_on()
        children.signal(first, signal.SIGSTOP)

        async def taken_over() -> bool:
            async with AsyncClient(addresses[1]) as other:
                return [one.state for one in await pipelines(other)] == ["ready"]

        await until(taken_over, 60)
        children.signal(first, signal.SIGCONT)
        await streams.moved_on()
        await streams.finish()
        assert streams.faults == []
        generation = gen.Generation(token_ids=gen.TokenIds(ids=[1]), stop=gen.StopConditions(max_tokens=1))
        with pytest.raises(StagelineError) as caught:
            await stuck.generate(generation, timeout_s=20)
        assert caught.value.reason == "PIPELINES_TAKEN"
