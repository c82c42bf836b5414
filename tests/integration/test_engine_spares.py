"""A stage is lost and nothing holds it any more but an unbound spare: it is bound to that stage, and no stream notices."""

from __future__ import annotations

import asyncio
import random

import pytest
from engine_helpers import (
    NUM_LAYERS,
    Cluster,
    ToyRunner,
    ToyStage,
    all_free,
    collect,
    expected_tokens,
    request,
    until,
)
from process_nursery import Nursery
from stage_server_helpers import ToyLoader

from gateway.engine import Engine
from gateway.pipelines.discovery import StaticDiscovery, record_at
from stageline.errors import CheckpointError
from stages.server.server import StageServer

CUT = [(0, 1), (1, 2), (2, NUM_LAYERS)]


async def start(cluster: Cluster, **settings: object) -> tuple[Engine, list[ToyStage]]:
    stages = [await cluster.add_stage(a, b, delay_s=0.004) for a, b in CUT]
    engine = await cluster.start(**settings)
    await until(engine.ready)
    return engine, stages


async def add_spare(cluster: Cluster, **options: object) -> tuple[ToyStage, ToyLoader]:
    """Serve says of it for ever what it was when it started."""
    loader = ToyLoader(ToyRunner, **options)  # type: ignore[arg-type]
    server = StageServer(None, fingerprint="toy", loader=loader)
    port = await server.start("127.0.0.1", 0)
    spare = ToyStage(server, loader.runner, await record_at(f"127.0.0.1:{port}"))
    cluster.stages.append(spare)
    cluster.announce()
    return spare, loader


def load(engine: Engine, count: int = 8, **changes: object):
    rng = random.Random(count)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 20))) for _ in range(count)]
    asked = [request(prompt, max_tokens=40, **changes) for prompt in prompts]
    return prompts, [asyncio.create_task(collect(engine, one)) for one in asked]


async def check(prompts, tasks) -> None:
    for prompt, answer in zip(prompts, await asyncio.gather(*tasks), strict=True):
        assert answer[0].token_ids == expected_tokens(prompt, 40, num_stages=3)


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_an_unbound_spare_takes_any_stage(cluster: Cluster, which: int) -> None:
    engine, stages = await start(cluster)
    _, loader = await add_spare(cluster)
    loader.gate.clear()
    assert [one.state for one in engine.spares()] == ["unbound"]
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await cluster.kill(stages[which])
    await until(lambda: loader.loads == ["-".join(map(str, CUT[which]))])
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in tasks)
    loader.gate.set()
    await check(prompts, tasks)
    await until(lambda: all_free(engine))


async def test_a_replacement_that_comes_first_is_taken(cluster: Cluster) -> None:
    engine, stages = await start(cluster)
    _, loader = await add_spare(cluster)
    loader.gate.clear()
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await cluster.kill(stages[1])
    await until(lambda: bool(loader.loads))
    await cluster.add_stage(1, 2)
    await check(prompts, tasks)
    loader.gate.set()
    await until(lambda: [(one.state, one.layers) for one in engine.spares()] == [("spare", "1-2")])
    # Now it is a spare of a stage that stands: it takes another one.
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await cluster.kill(stages[2])
    await check(prompts, tasks)
    assert loader.loads == ["1-2", "2-4"]


async def test_a_spare_that_fails_is_passed_over(cluster: Cluster) -> None:
    engine, stages = await start(cluster)
    loaders = [(await add_spare(cluster))[1] for _ in range(3)]
    for loader in loaders:  # whichever is asked first and second
        loader.check = _broken(loader, loaders)  # type: ignore[method-assign]
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await cluster.kill(stages[0])
    await check(prompts, tasks)
    assert sorted(len(loader.loads) for loader in loaders) == [1, 1, 1]


def _broken(loader: ToyLoader, loaders: list[ToyLoader]):
    def check(layers: object) -> None:
        if sum(len(one.loads) for one in loaders) < 2:
            loader.fault = CheckpointError("SHARD_UNREADABLE", "its disk is full")

    return check


async def test_two_stages_are_lost_and_there_are_two_spares(cluster: Cluster) -> None:
    engine, stages = await start(cluster)
    loaders = [(await add_spare(cluster))[1] for _ in range(2)]
    prompts, tasks = load(engine)
    await asyncio.sleep(0.1)
    await asyncio.gather(cluster.kill(stages[0]), cluster.kill(stages[2]))
    await check(prompts, tasks)
    assert sorted(one for loader in loaders for one in loader.loads) == ["0-1", "2-4"]


async def test_stages_are_killed_until_spares_serve_them_all(cluster: Cluster, children: Nursery) -> None:
    """Three processes and three spares; each stage gets a SIGKILL while greedy and seeded streams run."""
    stages = [children.stage(a, b, num_blocks=96, delay_s=0.004) for a, b in CUT]
    spares = [children.spare(num_blocks=96, delay_s=0.004) for _ in CUT]
    engine = await cluster.start(max_step_sequences=4)
    discovery = StaticDiscovery([one["address"] for one in [*stages, *spares]], cluster.registry)
    await discovery.start()
    try:
        await until(engine.ready)
        asked = [request((i, 7), max_tokens=120, temperature=i % 2, seed=i, use_prefix_cache=False) for i in range(10)]
        undisturbed = await asyncio.gather(*(collect(engine, one) for one in asked))
        tasks = [asyncio.create_task(collect(engine, one)) for one in asked]
        for stage in random.Random(5).sample(stages, 3):
            await asyncio.sleep(0.15)
            before = engine.pipelines()[0].epoch
            assert not all(task.done() for task in tasks)
            children.kill(stage)
            await until(lambda epoch=before: engine.ready() and engine.pipelines()[0].epoch > epoch, 30)
        disturbed = await asyncio.gather(*tasks)
        assert [one[0].token_ids for one in disturbed] == [one[0].token_ids for one in undisturbed]
        assert all(len(one[0].token_ids) == 120 for one in disturbed)
        in_use = {stage.address for stage in engine.pipelines()[0].stages}
        assert in_use == {spare["address"] for spare in spares}
        await until(lambda: all_free(engine))
    finally:
        await discovery.stop()
