"""Health tells the truth: a burst neither fails its checks nor hides a stage that stands still."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter

import grpc.aio
import httpx
import pytest
from engine_helpers import expected_tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from process_nursery import nursery

from gateway.api.grpc.server import OPERATIONS, SERVICE
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

INTERVAL_S, UNREADY_S = 0.5, 1.5
BURST = 2000
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def cluster():
    with nursery() as children:
        stages = [children.stage(start, end, num_blocks=512, delay_s=0.002) for start, end in ((0, 2), (2, 4))]
        gateway = children.gateway(
            stages,
            # The lease is long, so that only the missing steps can tell.
            settings={"canary_interval_s": INTERVAL_S, "unready_after_s": UNREADY_S, "lease_s": 60.0},
        )
        yield children, stages, gateway


class Probes:
    """Asks all the health checks a kubelet or load balancer would, 20 times a second, on connections of their own."""

    def __init__(self, gateway) -> None:
        self._gateway = gateway
        self.ready = True
        self.slowest_s = 0.0
        self.count = 0
        self.disagreed = 0

    async def run(self) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with (
            grpc.aio.insecure_channel(self._gateway["grpc"], options=options) as channel,
            httpx.AsyncClient(base_url=self._gateway["http"], timeout=10) as web,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                began_s = time.monotonic()
                answers = await asyncio.gather(
                    *(
                        health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                        for name in ("", SERVICE, OPERATIONS)
                    ),
                    web.get("/healthz"),
                    web.get("/readyz"),
                )
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                self.count += 1
                whole, inference, operations, alive, ready = answers
                assert (operations.status, alive.status_code) == (SERVING, 200), "the process lives all the time"
                self.ready = whole.status == inference.status == SERVING and ready.status_code == 200
                self.disagreed += not self.ready and not (
                    whole.status == inference.status == NOT_SERVING and ready.status_code == 503
                )
                await asyncio.sleep(0.05)

    async def until(self, ready: bool, within_s: float) -> float:
        """Seconds until every check says so."""
        began_s = time.monotonic()
        async with asyncio.timeout(within_s):
            while self.ready is not ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return time.monotonic() - began_s


async def ask(stub, seed: int, outcomes: Counter) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 12))]
    generation = gen.Generation(
        token_ids=gen.TokenIds(ids=prompt),
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=3, ignore_eos=True),
    )
    tokens: list[int] = []
    try:
        async for message in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation)):
            tokens += [token for choice in message.choices for token in choice.token_ids]
    except grpc.aio.AioRpcError as error:
        outcomes[error.code().name] += 1
        return
    outcomes["right" if tokens == expected_tokens(prompt, 3, num_stages=2) else "wrong"] += 1


async def test_an_idle_gateway_sees_a_stage_that_stands_still_and_that_it_goes_on(cluster):
    children, stages, gateway = cluster
    probes = Probes(gateway)
    probing = asyncio.create_task(probes.run())
    for stage in stages:
        children.signal(stage, signal.SIGSTOP)
        await probes.until(False, INTERVAL_S + UNREADY_S + 5.0)
        children.signal(stage, signal.SIGCONT)
        await probes.until(True, 8.0)
    assert not probing.done(), probing.result()
    probing.cancel()


async def test_a_burst_neither_fails_the_checks_nor_hides_a_stall(cluster):
    children, stages, gateway = cluster
    probes, outcomes = Probes(gateway), Counter()
    probing = asyncio.create_task(probes.run())
    async with grpc.aio.insecure_channel(gateway["grpc"]) as channel:
        stub = InferenceServiceStub(channel)
        asked = [asyncio.create_task(ask(stub, seed, outcomes)) for seed in range(BURST)]
        while outcomes["right"] < 50:
            await asyncio.sleep(0.01)
            assert probes.ready
        stopped_s = time.monotonic()
        children.signal(stages[1], signal.SIGSTOP)
        await probes.until(False, UNREADY_S + 5.0)
        assert time.monotonic() - stopped_s > 0.5, "it is the stall that was seen"
        children.signal(stages[1], signal.SIGCONT)
        await probes.until(True, 8.0)
        await asyncio.wait_for(asyncio.gather(*asked), 120)
        assert probes.ready
    assert not probing.done(), probing.result()
    probing.cancel()
    assert outcomes["right"] >= 500
    assert outcomes["right"] + outcomes["RESOURCE_EXHAUSTED"] == BURST, outcomes
    assert probes.slowest_s < 8, "ours share two cores with the sender of the burst, so this bounds hangs, not delays"
    async with httpx.AsyncClient(base_url=gateway["http"]) as web:
        text = (await web.get("/metrics")).text
        assert 'invariant_violations_total{model_name="toy"} 0.0' in text
