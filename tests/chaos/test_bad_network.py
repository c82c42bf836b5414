"""A bad network between gateway and stages: clients see a pause and exactly the same tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from fault_proxy import FaultProxy

from gateway.engine import Engine
from gateway.pipelines.discovery import StaticDiscovery
from tests.integration.engine_helpers import NUM_LAYERS, Cluster, all_free, collect, expected_tokens, request, until


@dataclass
class Network:
    """Two toy stages, each behind a proxy; everything the gateway and the neighbour send goes through it."""

    engine: Engine
    proxies: list[FaultProxy]
    tasks: list[asyncio.Task]
    prompts: list[tuple[int, ...]]
    num_tokens: int = 40

    def load(self, count: int = 8) -> None:
        """Start streams."""
        rng = random.Random(count)
        self.prompts = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 20))) for _ in range(count)]
        self.tasks = [
            asyncio.create_task(collect(self.engine, request(p, max_tokens=self.num_tokens))) for p in self.prompts
        ]

    async def check(self) -> None:
        """All streams end with the tokens of an undisturbed run, and nothing of them stays."""
        answers = await asyncio.wait_for(asyncio.gather(*self.tasks), 40)
        for prompt, answer in zip(self.prompts, answers, strict=True):
            assert answer[0].token_ids == expected_tokens(prompt, self.num_tokens, num_stages=2)
        await until(lambda: all_free(self.engine))


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    cluster = Cluster()
    proxies = []
    for layers in ((0, 2), (2, NUM_LAYERS)):
        stage = await cluster.add_stage(*layers, delay_s=0.01)
        host, _, port = stage.record.address.partition(":")
        proxies.append(FaultProxy(host, int(port), seed=layers[0]))
    cluster.registry.set_replicas("test", [])
    discovery = StaticDiscovery([await proxy.start() for proxy in proxies], cluster.registry, interval_s=0.1)
    await discovery.start()
    engine = await cluster.start()
    await until(engine.ready)
    running = Network(engine, proxies, [], [])
    yield running
    await discovery.stop()
    await cluster.stop()
    for proxy in proxies:
        await proxy.stop()


async def test_50_ms_of_delay_and_jitter_change_no_token(network: Network) -> None:
    for proxy in network.proxies:
        proxy.delay_s = proxy.jitter_s = 0.05
    network.num_tokens = 12
    network.load()
    await network.check()
    assert network.engine.pipelines()[0].epoch == 1, "a slow network is not a broken one"


@pytest.mark.parametrize("which", [0, 1])
async def test_a_reset_is_a_pause(network: Network, which: int) -> None:
    network.load()
    await asyncio.sleep(0.15)
    assert not any(task.done() for task in network.tasks)
    await network.proxies[which].reset()
    await network.check()
    assert network.engine.pipelines()[0].epoch > 1


@pytest.mark.parametrize("which", [0, 1])
async def test_a_cut_in_the_middle_of_a_message_is_a_pause(network: Network, which: int) -> None:
    network.load()
    await asyncio.sleep(0.1)
    proxy = network.proxies[which]
    for number in range(1, 4):
        async with asyncio.timeout(10):
            proxy.cut_after_bytes = 3001 * number  # counted from the start of a connection
            while proxy.num_cut < number and not all(task.done() for task in network.tasks):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    proxy.cut_after_bytes = None
    assert proxy.num_cut >= 1
    await network.check()


@pytest.mark.parametrize("which", [0, 1])
async def test_a_stall_past_the_lease_is_a_pause(network: Network, which: int) -> None:
    network.load()
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in network.tasks)
    network.proxies[which].stall()
    await asyncio.sleep(3.0)
    assert not any(task.done() for task in network.tasks)
    network.proxies[which].resume()
    await network.check()
