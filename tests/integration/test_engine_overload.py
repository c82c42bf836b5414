"""More work than fits, through the engine and real stage servers: who waits, who is dropped, and what it costs."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest
from engine_helpers import NUM_LAYERS, Cluster, all_free, collect, expected_tokens, request, until

from stageline.errors import DeadlineExceededError

MARK = 250  # a token that only doomed prompts hold


@pytest.fixture
async def cluster():
    running = Cluster()
    yield running
    await running.stop()


async def ready(cluster: Cluster, *, num_blocks: int = 64, delay_s: float = 0.002, **settings):
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=delay_s, num_blocks=num_blocks)
    engine = await cluster.start(**settings)
    await until(engine.ready)
    return engine


def computed(cluster: Cluster) -> list[int]:
    """A list that grows by every token that the first stage computes."""
    runner, tokens = cluster.stages[0].runner, []
    compute = runner.execute

    def execute(batch, *rest):
        tokens.extend(int(token) for token in batch.token_ids)
        return compute(batch, *rest)

    runner.execute = execute
    return tokens


async def test_what_expires_in_the_queue_costs_no_compute(cluster):
    engine = await ready(cluster, max_step_sequences=1, max_step_tokens=16, delay_s=0.01)
    tokens = computed(cluster)
    long = [asyncio.create_task(collect(engine, request([i % 3, 7], max_tokens=60))) for i in range(5)]
    # How many run at a time depends on what steps are measured to take; all the others are behind them.
    await until(lambda: engine.pipelines()[0].num_waiting_sequences > 0)
    doomed = [
        asyncio.create_task(collect(engine, request([MARK] * 30, deadline_s=time.monotonic() + 0.1, max_tokens=5)))
        for _ in range(20)
    ]
    for one in doomed:
        with pytest.raises(DeadlineExceededError):
            await one
    now = engine.pipelines()[0]
    assert now.num_running_sequences + now.num_waiting_sequences <= len(long), "nothing that expired is left"
    for i, one in enumerate(long):
        assert (await one)[0].token_ids == expected_tokens([i % 3, 7], 60, num_stages=2)
    assert len(tokens) >= 5 * 60
    assert MARK not in tokens


async def test_a_deadline_in_mid_prefill_ends_it_there(cluster):
    engine = await ready(cluster, max_step_tokens=4, min_prefill_tokens=4, delay_s=0.02)
    tokens = computed(cluster)
    with pytest.raises(DeadlineExceededError):
        await collect(engine, request([MARK] * 150, deadline_s=time.monotonic() + 0.2, max_tokens=5))
    at_the_end = len(tokens)
    await until(lambda: all_free(engine))
    await asyncio.sleep(0.2)
    assert 0 < tokens.count(MARK) < 150
    assert len(tokens) <= at_the_end + 3 * 4, "only what was out came back"


async def test_one_request_with_many_choices_leaves_others_their_blocks(cluster):
    engine = await ready(cluster, num_blocks=64, prefix_caching=False)
    giant = asyncio.create_task(collect(engine, request(range(40), max_tokens=60, num_choices=8)))
    await until(lambda: engine.pipelines()[0].num_free_blocks < 40)
    others = [request([i, 3], max_tokens=20) for i in range(8)]
    answers = await asyncio.wait_for(asyncio.gather(*(collect(engine, one) for one in others)), 20)
    assert not giant.done(), "the short ones did not wait for it"
    for i, answer in enumerate(answers):
        assert answer[0].token_ids == expected_tokens([i, 3], 20, num_stages=2)
    whole = await giant
    assert {tuple(one.token_ids) for one in whole.values()} == {tuple(expected_tokens(range(40), 60, num_stages=2))}


async def test_higher_priority_goes_first(cluster):
    engine = await ready(cluster, max_step_sequences=1, delay_s=0.01)
    blockers = [asyncio.create_task(collect(engine, request([i], max_tokens=40))) for i in range(5)]
    await until(lambda: engine.pipelines()[0].num_waiting_sequences > 0)
    order: list[int] = []

    async def ask(priority: int) -> None:
        async with aclosing(engine.generate(request([priority + 100], max_tokens=4, priority=priority))) as deltas:
            await anext(deltas)
            order.append(priority)
            async for _ in deltas:
                pass

    tasks = [asyncio.create_task(ask(priority)) for priority in (-5, 0, 5)]
    await asyncio.gather(*tasks, *blockers)
    assert order == [5, 0, -5]
