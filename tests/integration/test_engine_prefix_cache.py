"""The prefix cache over real stage servers: the same tokens, fewer of them computed."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest
from engine_helpers import BLOCK_TOKENS, NUM_LAYERS, Cluster, all_free, collect, expected_tokens, request, until

RNG = random.Random(4)
PREFIX = tuple(RNG.randrange(256) for _ in range(40))


async def start(cluster: Cluster, cuts=(0, 2, NUM_LAYERS), **settings):
    for first, last in pairwise(cuts):
        await cluster.add_stage(first, last)
    engine = await cluster.start(**settings)
    await until(engine.ready)
    return engine


async def test_a_second_request_takes_the_blocks_of_the_first(cluster):
    engine = await start(cluster)
    for tail, cached in [((1,), 0), ((2,), 40), ((), 36)]:  # the last token of a prompt is always computed
        prompt = PREFIX + tail
        answer = (await collect(engine, request(prompt)))[0]
        assert answer.token_ids == expected_tokens(prompt, 16, num_stages=2)
        assert answer.cached_prompt_tokens == cached
    turn = (*PREFIX, 2, *expected_tokens((*PREFIX, 2), 16, num_stages=2), 9)
    answer = (await collect(engine, request(turn)))[0]
    assert answer.cached_prompt_tokens == (len(turn) - 2) // BLOCK_TOKENS * BLOCK_TOKENS, "the answer is cached too"
    assert answer.token_ids == expected_tokens(turn, 16, num_stages=2)


@pytest.mark.parametrize(
    "other", [{"tenant": "b"}, {"cache_salt": "b"}, {"use_prefix_cache": False}], ids=["tenant", "salt", "switched off"]
)
async def test_prefixes_are_not_shared_with(cluster, other):
    engine = await start(cluster)
    await collect(engine, request(PREFIX))
    for _ in range(2):
        answer = (await collect(engine, request(PREFIX, **other)))[0]
        assert answer.token_ids == expected_tokens(PREFIX, 16, num_stages=2)
        first_time = answer.cached_prompt_tokens if _ == 0 else 0
        assert first_time == 0
    assert answer.cached_prompt_tokens == (0 if "use_prefix_cache" in other else 36)


async def test_the_configuration_switches_it_off(cluster):
    engine = await start(cluster, prefix_caching=False)
    for _ in range(2):
        assert (await collect(engine, request(PREFIX)))[0].cached_prompt_tokens == 0


async def test_requests_that_come_together_compute_their_beginning_once(cluster):
    engine = await start(cluster, max_step_tokens=16, min_prefill_tokens=4)
    prompts = [(*PREFIX, number) for number in range(6)]
    answers = await asyncio.gather(*(collect(engine, request(prompt)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer[0].token_ids == expected_tokens(prompt, 16, num_stages=2)
    assert sum(answer[0].cached_prompt_tokens >= 32 for answer in answers) >= 5
    await until(lambda: all_free(engine))


async def test_a_recovered_pipeline_has_forgotten_its_prefixes(cluster):
    engine = await start(cluster)
    await collect(engine, request(PREFIX))
    await cluster.kill(cluster.stages[1])
    await cluster.add_stage(2, NUM_LAYERS)
    await until(lambda: engine.ready() and engine.pipelines()[0].epoch > 1)
    for cached in (0, 36):
        answer = (await collect(engine, request(PREFIX)))[0]
        assert answer.cached_prompt_tokens == cached
        assert answer.token_ids == expected_tokens(PREFIX, 16, num_stages=2)


async def test_a_request_goes_to_the_pipeline_that_holds_its_prefix_unless_that_is_too_busy(cluster):
    engine = await start(cluster)
    for first, last in [(0, 2), (2, NUM_LAYERS)]:
        await cluster.add_stage(first, last)
    await until(lambda: [p.state for p in engine.pipelines()] == ["ready", "ready"])
    await collect(engine, request(PREFIX))
    holder = next(lane for lane in engine._keeper.lanes if lane.scheduler.num_cached_blocks)
    other = next(lane for lane in engine._keeper.lanes if lane is not holder)
    for tail in range(3):
        assert (await collect(engine, request((*PREFIX, tail))))[0].cached_prompt_tokens == 40
    assert not other.scheduler.num_cached_blocks
    busy = asyncio.create_task(collect(engine, request((*PREFIX, 7), max_tokens=100)))
    await until(lambda: holder.load == 1)
    assert (await collect(engine, request((*PREFIX, 8))))[0].cached_prompt_tokens == 0
    assert other.scheduler.num_cached_blocks
    await busy
