"""A stage is lost while another pipeline stands: streams go on there at once, unless a spare takes over sooner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from engine_helpers import NUM_LAYERS, Answer, Cluster, all_free, expected_tokens, request, until
from process_nursery import Nursery

from gateway.engine.takeover import TakeoverTimes
from gateway.pipelines.discovery import StaticDiscovery, record_at

CUT = ((0, 2), (2, NUM_LAYERS))
STAGE = {"num_blocks": 512, "delay_s": 0.004}
NUM_STREAMS, NUM_TOKENS = 8, 150


class Streams:
    """So many at once; when each got its last token, and what was said."""

    def __init__(self, cluster: Cluster) -> None:
        self.prompts = [(3 * i + 1,) * (i + 1) for i in range(NUM_STREAMS)]
        self.pauses_s = [0.0] * NUM_STREAMS
        self._engine = cluster.engine
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(NUM_STREAMS)]

    async def _run(self, index: int) -> list[int]:
        answer, last_s = Answer(), time.monotonic()
        async for delta in self._engine.generate(request(self.prompts[index], max_tokens=NUM_TOKENS)):
            now_s = time.monotonic()
            self.pauses_s[index], last_s = max(self.pauses_s[index], now_s - last_s), now_s
            answer.take(delta)
        return answer.token_ids

    async def check(self) -> None:
        """All end, and say what they would have said undisturbed."""
        for prompt, tokens in zip(self.prompts, await asyncio.gather(*self._tasks), strict=True):
            assert tokens == expected_tokens(prompt, NUM_TOKENS, num_stages=len(CUT))

    @property
    def running(self) -> bool:
        return not any(task.done() for task in self._tasks)


@asynccontextmanager
async def processes(cluster: Cluster, children: Nursery, *more: tuple[int, int]) -> AsyncIterator[list[dict]]:
    """Two pipelines of processes, and further stages."""
    stages = [children.stage(*layers, **STAGE) for layers in [*CUT, *CUT, *more]]
    await cluster.start(lease_s=20.0)
    discovery = StaticDiscovery([stage["address"] for stage in stages], cluster.registry)
    await discovery.start()
    try:
        await until(lambda: states(cluster) == ["ready", "ready"])
        yield stages
    finally:
        await discovery.stop()
        children.kill_all()


def states(cluster: Cluster) -> list[str]:
    return [one.state for one in cluster.engine.pipelines()]


def kill_in_first_pipeline(cluster: Cluster, children: Nursery, stages: list[dict]) -> None:
    victim = cluster.engine.pipelines()[0].stages[1].address
    children.kill(next(stage for stage in stages if stage["address"] == victim))


async def both_run(cluster: Cluster, streams: Streams) -> None:
    await until(lambda: all(one.num_running_sequences >= 2 for one in cluster.engine.pipelines()))
    await asyncio.sleep(0.1)
    assert streams.running


@pytest.mark.parametrize("replica_takes_s", [None, 30.0])
async def test_without_a_spare_streams_go_on_at_once_on_the_other_pipeline(cluster, children, replica_takes_s):
    """Whether or not it is known how long a new replica takes."""
    async with processes(cluster, children) as stages:
        if replica_takes_s is not None:
            cluster.engine._keeper._times = TakeoverTimes(opening_s=0.2, replacing_s=replica_takes_s)
        streams = Streams(cluster)
        await both_run(cluster, streams)
        kill_in_first_pipeline(cluster, children, stages)
        await until(lambda: len(states(cluster)) == 1)
        assert streams.running
        await streams.check()
        assert max(streams.pauses_s) < 5.0  # 30 s would be the replica's
        assert states(cluster) == ["ready"]
        await until(lambda: all_free(cluster.engine))


async def test_with_a_hot_spare_streams_stay(cluster, children):
    async with processes(cluster, children, CUT[1]) as stages:
        cluster.engine._keeper._times = TakeoverTimes(opening_s=0.3)  # however busy this machine was
        streams = Streams(cluster)
        await both_run(cluster, streams)
        first, second = cluster.engine._keeper.lanes
        there = second.load
        kill_in_first_pipeline(cluster, children, stages)
        await until(lambda: first.num_recoveries == 1 and first.num_tokens > 0)
        assert second.load == there
        await streams.check()
        assert states(cluster) == ["ready", "ready"]
        await until(lambda: all_free(cluster.engine))


async def test_streams_wait_where_the_other_pipeline_has_no_room_and_no_longer_than_it_took_before(cluster, children):
    stages = [children.stage(*layers, **STAGE) for layers in CUT]
    small = [children.stage(*layers, num_blocks=42, delay_s=0.004) for layers in CUT]  # the longest, nothing beside it
    engine = await cluster.start(lease_s=20.0)
    records = [await record_at(stage["address"]) for stage in [*stages, *small]]
    cluster.registry.set_replicas("children", records[:2])
    await until(lambda: states(cluster) == ["ready"])
    streams = Streams(cluster)
    first = engine._keeper.lanes[0]
    await until(lambda: first.num_tokens > 60 * NUM_STREAMS)
    cluster.registry.set_replicas("children", records)
    await until(lambda: states(cluster) == ["ready", "ready"])
    engine._keeper._times = TakeoverTimes(opening_s=0.2, replacing_s=2.0)
    assert streams.running
    children.kill(stages[1])
    cluster.registry.set_replicas("children", [records[0], *records[2:]])
    second = engine._keeper.lanes[1]
    await until(lambda: first.state == "recovering" and not first.stages)
    await asyncio.sleep(0.3)
    assert first.load > second.load
    assert first.load + second.load == NUM_STREAMS
    await until(lambda: len(states(cluster)) == 1)  # 3 s later nobody knows any more when it comes
    await streams.check()
    await until(lambda: all_free(engine))
    children.kill_all()
