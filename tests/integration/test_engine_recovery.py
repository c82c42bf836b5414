"""Stages die, drain and come back while requests run: clients see a pause and exactly the same tokens."""

from __future__ import annotations

import asyncio
import random

import pytest
from engine_helpers import NUM_LAYERS, Cluster, ToyStage, all_free, collect, expected_tokens, request, until

from gateway.pipelines.discovery import Registry, StaticDiscovery
from gateway.pipelines.form import chain
from gateway.pipelines.pipeline import Pipeline
from stageline.errors import FailedPreconditionError, UnavailableError


async def start(cluster: Cluster, *, delay_s: float = 0.004, **settings):
    stages = [await cluster.add_stage(a, b, delay_s=delay_s) for a, b in [(0, 1), (1, 2), (2, NUM_LAYERS)]]
    engine = await cluster.start(**settings)
    await until(engine.ready)
    return engine, stages


def load(engine, count: int = 10, seed: int = 0):
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 20))) for _ in range(count)]
    return prompts, [asyncio.create_task(collect(engine, request(prompt, max_tokens=40))) for prompt in prompts]


async def check(prompts, tasks) -> None:
    for prompt, answer in zip(prompts, await asyncio.gather(*tasks), strict=True):
        assert answer[0].token_ids == expected_tokens(prompt, 40, num_stages=3)


async def replace(cluster: Cluster, dead: ToyStage) -> None:
    await cluster.add_stage(dead.runner.layers.start_layer, dead.runner.layers.end_layer)


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_stage_dies_and_a_replacement_comes(cluster, which):
    engine, stages = await start(cluster)
    prompts, tasks = load(engine)
    await asyncio.sleep(0.15)
    assert not any(task.done() for task in tasks)
    await cluster.kill(stages[which])
    await until(lambda: engine.pipelines()[0].state == "recovering")
    assert not engine.ready()
    more_prompts, more_tasks = load(engine, count=3, seed=9)  # new work is taken meanwhile
    await asyncio.sleep(0.3)
    assert engine.pipelines()[0].num_waiting_sequences >= 3
    assert not any(task.done() for task in [*tasks, *more_tasks])
    await replace(cluster, stages[which])
    await check([*prompts, *more_prompts], [*tasks, *more_tasks])
    await until(lambda: all_free(engine))
    assert engine.pipelines()[0].epoch > 1


async def test_a_spare_takes_over(cluster):
    engine, stages = await start(cluster)
    await cluster.add_stage(1, 2)
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await cluster.kill(stages[1])  # the registry still lists the dead one
    await check(prompts, tasks)


async def test_stages_die_again_and_again(cluster):
    engine, _ = await start(cluster, max_step_sequences=4)
    prompts, tasks = load(engine, count=16)
    rng = random.Random(3)
    for _ in range(4):
        await asyncio.sleep(rng.uniform(0.02, 0.2))
        dead = rng.choice(cluster.stages)
        await cluster.kill(dead)
        await replace(cluster, dead)
    await check(prompts, tasks)


async def test_more_sequences_than_the_queue_admits_survive(cluster):
    engine, stages = await start(cluster, max_waiting_sequences=2)
    prompts, tasks = [], []
    for index in range(6):  # one after the other, so that each is running before the next comes
        more, task = load(engine, count=1, seed=index)
        prompts += more
        tasks += task
        await until(lambda count=index + 1: engine.pipelines()[0].num_running_sequences == count)
    await cluster.kill(stages[2])
    await replace(cluster, stages[2])
    await check(prompts, tasks)


async def test_sequences_move_to_the_pipeline_that_stands(cluster):
    engine, stages = await start(cluster)
    for layers in [(0, 1), (1, 2), (2, NUM_LAYERS)]:
        await cluster.add_stage(*layers, delay_s=0.004)
    await until(lambda: [p.state for p in engine.pipelines()] == ["ready", "ready"])
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await cluster.kill(stages[1])
    cluster.announce()
    await check(prompts, tasks)
    assert [p.state for p in engine.pipelines()] == ["ready"]
    assert {spare.layers for spare in engine.spares()} == {"0-1", "2-4"}
    await replace(cluster, stages[1])
    await until(lambda: [p.state for p in engine.pipelines()] == ["ready", "ready"])


async def test_a_draining_stage_serves_until_another_takes_over(cluster):
    engine, stages = await start(cluster)
    prompts, tasks = load(engine)
    await asyncio.sleep(0.05)
    await stages[0].server.drain()
    await asyncio.sleep(0.1)
    assert engine.ready()
    await cluster.add_stage(0, 1, delay_s=0.004)
    await until(lambda: engine.ready() and engine.pipelines()[0].epoch > 1)
    await check(prompts, tasks)
    assert stages[0].record.address not in {stage.address for stage in engine.pipelines()[0].stages}


async def test_a_lost_lease_breaks_the_pipeline_and_another_owner_is_refused(cluster):
    stages = [await cluster.add_stage(0, 2), await cluster.add_stage(2, NUM_LAYERS)]
    found = chain([stage.record for stage in stages], "toy")[0][0]
    first = Pipeline(found, owner_id="first", lease_s=0.8)
    second = Pipeline(found, owner_id="second", lease_s=5.0)
    try:
        await first.open(lambda result: None, lambda incarnation, remaining_s: None)
        with pytest.raises(FailedPreconditionError) as refused:
            await second.open(lambda result: None, lambda incarnation, remaining_s: None)
        assert refused.value.reason == "STAGE_CLAIMED"
        for task in first._tasks:  # a paused process: it neither renews nor notices
            task.cancel()
        await asyncio.sleep(1.2)
        retry = Pipeline(found, owner_id="second", lease_s=5.0)
        await retry.open(lambda result: None, lambda incarnation, remaining_s: None)
        assert retry.epoch > first.epoch
        await retry.close()
    finally:
        await first.close()
        await second.close()


async def test_stages_that_saw_different_epochs_agree_on_one(cluster):
    stages = [await cluster.add_stage(0, 2), await cluster.add_stage(2, NUM_LAYERS)]
    found = chain([stage.record for stage in stages], "toy")[0][0]
    alone = Pipeline(found[1:], owner_id="me", lease_s=5.0)
    for _ in range(3):  # only the last stage grants epochs
        alone._granted = [0]
        await alone._claim()
    both = Pipeline(found, owner_id="me", lease_s=5.0)
    await both.open(lambda result: None, lambda incarnation, remaining_s: None)
    assert {stage.server._claims.epoch for stage in stages} == {both.epoch}
    assert both.epoch > alone.epoch
    await both.close()
    await alone.close()


async def test_static_discovery_finds_stages_and_forgets_the_dead(cluster):
    stages = [await cluster.add_stage(0, 2), await cluster.add_stage(2, NUM_LAYERS)]
    registry = Registry()
    discovery = StaticDiscovery([stage.record.address for stage in stages], registry, interval_s=0.05)
    await discovery.start()
    assert set(registry.replicas()) == {stage.record for stage in stages}
    await cluster.kill(stages[0])
    await until(lambda: registry.replicas() == (stages[1].record,))
    await discovery.stop()


async def two_pipelines(cluster: Cluster):
    stages = [await cluster.add_stage(a, b, delay_s=0.004) for _ in range(2) for a, b in [(0, 2), (2, NUM_LAYERS)]]
    engine = await cluster.start()
    await until(lambda: [one.state for one in engine.pipelines()] == ["ready", "ready"])
    return engine, stages


def of_pipeline(engine, stages: list[ToyStage], place: int) -> list[ToyStage]:
    pipeline = engine.pipelines()[place]
    return [next(s for s in stages if s.record.address == replica.address) for replica in pipeline.stages]


async def check_two(prompts, tasks) -> None:
    for prompt, answer in zip(prompts, await asyncio.gather(*tasks), strict=True):
        assert answer[0].token_ids == expected_tokens(prompt, 40, num_stages=2)


async def test_sequences_leave_a_draining_pipeline_for_one_that_stands(cluster):
    engine, stages = await two_pipelines(cluster)
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)
    await of_pipeline(engine, stages, 0)[1].server.drain(0.6)  # too short for any of them
    await until(lambda: len(engine.pipelines()) == 1)
    assert not all(task.done() for task in tasks)
    await check_two(prompts, tasks)
    await until(lambda: all_free(engine))


async def test_two_pipelines_that_drain_make_one(cluster):
    engine, stages = await two_pipelines(cluster)
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    leaving = [of_pipeline(engine, stages, 0)[0], of_pipeline(engine, stages, 1)[1]]
    for stage in leaving:
        await stage.server.drain(20)
    await asyncio.wait_for(asyncio.gather(*(stage.server.drained() for stage in leaving)), 10)
    await check_two(prompts, tasks)
    await until(lambda: [one.state for one in engine.pipelines()] == ["ready"])
    in_use = {stage.address for stage in engine.pipelines()[0].stages}
    assert in_use == {stage.record.address for stage in stages if stage not in leaving}


async def test_no_sequence_moves_to_other_weights(cluster, monkeypatch):
    """New weights come pipeline by pipeline; what began on the old ones ends on them."""
    engine, stages = await two_pipelines(cluster)
    prompts, tasks = load(engine)
    monkeypatch.setattr("engine_helpers.FINGERPRINT", "new")
    new = [await cluster.add_stage(*layers, delay_s=0.004) for layers in [(0, 2), (2, NUM_LAYERS)]]
    assert {stage.record.fingerprint for stage in new} == {"new"}
    for stage in of_pipeline(engine, stages, 0):
        await stage.server.drain(0.6)
    await until(lambda: len(engine.pipelines()) == 1)
    await check_two(prompts, tasks)
    in_use = {replica.address for one in engine.pipelines() for replica in one.stages}
    assert not in_use & {stage.record.address for stage in new}
    assert all(stage.server._claims.epoch == 0 for stage in new)


async def test_a_model_that_is_gone_is_said_to_be_and_may_come_back(cluster, monkeypatch):
    """Waiting, queued and new requests hear of it, each with when to try again, and not before the time is up."""
    old = [await cluster.add_stage(*layers, delay_s=0.004) for layers in [(0, 2), (2, NUM_LAYERS)]]
    engine = await cluster.start(superseded_after_s=1.0)
    await until(engine.ready)
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    monkeypatch.setattr("engine_helpers.FINGERPRINT", "new")
    new = [await cluster.add_stage(*layers) for layers in [(0, 2), (2, NUM_LAYERS)]]
    for stage in old:
        await cluster.kill(stage)
    began_s = asyncio.get_running_loop().time()
    cluster.announce()
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(answer, UnavailableError)
        assert answer.reason == "MODEL_SUPERSEDED"
        assert float(answer.metadata["retry_after_s"]) > 0
    assert asyncio.get_running_loop().time() - began_s > 0.9
    with pytest.raises(UnavailableError, match="fingerprint toy"):
        engine.check_room()
    with pytest.raises(UnavailableError, match="fingerprint toy"):
        await collect(engine, request((1,)))
    assert not engine.ready()
    assert all(stage.server._claims.epoch == 0 for stage in new)
    monkeypatch.setattr("engine_helpers.FINGERPRINT", "toy")  # rolled back
    for layers in [(0, 2), (2, NUM_LAYERS)]:
        await cluster.add_stage(*layers)
    await until(engine.ready)
    answer = await collect(engine, request(prompts[0]))
    assert answer[0].token_ids == expected_tokens(prompts[0], 16, num_stages=2)
