"""A request that kills the stages that compute it costs three of them, and no other request."""

from __future__ import annotations

import asyncio
import random

import pytest
from engine_helpers import NUM_LAYERS, Cluster, ToyStage, all_free, collect, expected_tokens, request, until

from stageline.errors import InternalError, UnavailableError

POISON = 255


class Doctor:
    """Replaces every stage that a poisonous step ends."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.num_deaths, self.loop = cluster, 0, asyncio.get_running_loop()
        self.tasks: set[asyncio.Task] = set()

    async def add(self, start: int, end: int, *, poisonous: bool) -> ToyStage:
        stage = await self.cluster.add_stage(start, end, delay_s=0.004, poison_token=POISON if poisonous else -1)
        stage.runner.on_poison = lambda: self.loop.call_soon_threadsafe(self._die, stage)
        return stage

    def _die(self, stage: ToyStage) -> None:
        if stage in self.cluster.stages:
            self.num_deaths += 1
            task = self.loop.create_task(self._replace(stage))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _replace(self, stage: ToyStage) -> None:
        layers = stage.runner.layers
        await self.cluster.kill(stage)
        await self.add(layers.start_layer, layers.end_layer, poisonous=stage.runner.poison_token == POISON)


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_poisonous_prompt_fails_alone(cluster, which):
    doctor = Doctor(cluster)
    for place, (start, end) in enumerate([(0, 1), (1, 2), (2, NUM_LAYERS)]):
        await doctor.add(start, end, poisonous=place == which)
    engine = await cluster.start()
    await until(engine.ready)
    rng = random.Random(which)
    prompts = []
    while len(prompts) < 8:
        prompt = tuple(rng.randrange(255) for _ in range(rng.randrange(1, 20)))
        if POISON not in expected_tokens(prompt, 40, num_stages=3):
            prompts.append(prompt)
    tasks = [asyncio.create_task(collect(engine, request(prompt, max_tokens=40))) for prompt in prompts]
    await asyncio.sleep(0.1)
    with pytest.raises(InternalError) as failed:
        await asyncio.wait_for(collect(engine, request((7, POISON, 8))), 60)
    assert failed.value.reason == "POISON_REQUEST"
    assert doctor.num_deaths == 3
    for prompt, answer in zip(prompts, await asyncio.gather(*tasks), strict=True):
        assert answer[0].token_ids == expected_tokens(prompt, 40, num_stages=3)
    await until(lambda: all_free(engine))


async def test_innocent_streams_outlive_any_number_of_deaths(cluster):
    doctor = Doctor(cluster)
    for start, end in [(0, 2), (2, NUM_LAYERS)]:
        await doctor.add(start, end, poisonous=False)
    engine = await cluster.start()
    await until(engine.ready)
    answer = asyncio.create_task(collect(engine, request((1, 2, 3), max_tokens=150)))
    lane = engine._keeper.lanes[0]
    for _ in range(8):
        await until(lambda: engine.ready() and lane.num_tokens >= 2)
        victim = cluster.stages[0]
        doctor._die(victim)
        await until(lambda: not engine.ready() or lane.num_tokens < 2)
    assert (await answer)[0].token_ids == expected_tokens((1, 2, 3), 150, num_stages=2)
    assert doctor.num_deaths == 8


async def test_a_pipeline_that_breaks_again_and_again_gives_its_requests_up(cluster, monkeypatch):
    monkeypatch.setattr("gateway.engine.poison.MAX_RESTARTS", 3)
    monkeypatch.setattr("gateway.engine.poison.DEATHS_TO_FAIL", 100)
    doctor = Doctor(cluster)
    for start, end in [(0, 2), (2, NUM_LAYERS)]:
        await doctor.add(start, end, poisonous=start == 0)
    engine = await cluster.start()
    await until(engine.ready)
    with pytest.raises(UnavailableError) as failed:
        await asyncio.wait_for(collect(engine, request((POISON, 8))), 60)
    assert failed.value.reason == "PIPELINE_UNSTABLE"
    assert doctor.num_deaths == 3
