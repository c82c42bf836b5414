"""Log-probabilities of prompts and continuations through the whole engine: chunks, stages, neighbours, deaths of stages."""

from __future__ import annotations

import asyncio
import random

import pytest
from engine_helpers import (
    BLOCK_TOKENS,
    NUM_LAYERS,
    Cluster,
    all_free,
    collect,
    expected_scores,
    expected_tokens,
    request,
    until,
)

from gateway.types import ScoreRequest
from stageline.errors import DeadlineExceededError, InternalError, InvalidArgumentError


async def start(cluster: Cluster, *, delay_s: float = 0.0, num_blocks: int = 64, **settings):
    for cut in [(0, 1), (1, 2), (2, NUM_LAYERS)]:
        await cluster.add_stage(*cut, delay_s=delay_s, num_blocks=num_blocks)
    engine = await cluster.start(**settings)
    await until(engine.ready)
    return engine


def random_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(256) for _ in range(count))


def check_prompt(answer, prompt) -> None:
    assert [entry.token_id for entry in answer.prompt_logprobs] == list(prompt[1:])
    got = [entry.logprob for entry in answer.prompt_logprobs]
    assert got == pytest.approx(expected_scores(prompt, num_stages=3), abs=1e-4)


def score_request(context, continuations, **fields) -> ScoreRequest:
    return ScoreRequest(
        request_id="test", context_token_ids=tuple(context), continuations=tuple(map(tuple, continuations)), **fields
    )


async def score(engine, what: ScoreRequest) -> list:
    found = {}
    async for one in engine.score(what):
        assert one.index not in found
        found[one.index] = one
    return [found[index] for index in range(len(what.continuations))]


def check_scores(scores, what: ScoreRequest) -> None:
    context = what.context_token_ids
    for one, continuation in zip(scores, what.continuations, strict=True):
        assert [entry.token_id for entry in one.logprobs] == list(continuation)
        expected = expected_scores(context + continuation, num_stages=3)[len(context) - 1 :]
        assert [entry.logprob for entry in one.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64])
async def test_prompts_in_chunks_beside_other_requests(cluster, max_step_tokens):
    engine = await start(cluster, max_step_tokens=max_step_tokens)
    rng = random.Random(max_step_tokens)
    prompts = [random_tokens(rng, length) for length in (1, 2, 3, 4, 5, 17, 40)]
    scored = [request(prompt, max_tokens=5, num_prompt_logprobs=2) for prompt in prompts]
    others = [request(prompt, max_tokens=20) for prompt in prompts]
    answers = await asyncio.gather(*(collect(engine, one) for one in (*scored, *others)))
    for prompt, answer, other in zip(prompts, answers[:7], answers[7:], strict=True):
        check_prompt(answer[0], prompt)
        assert answer[0].token_ids == expected_tokens(prompt, 5, num_stages=3)
        assert (other[0].prompt_logprobs, len(other[0].token_ids)) == (None, 20)
        for entry in answer[0].prompt_logprobs:
            assert len(entry.top) == 2
            assert entry.top[0][1] >= entry.top[1][1]
            assert (entry.rank == 1) == (entry.token_id == entry.top[0][0])
            assert entry.rank != 1 or entry.logprob == entry.top[0][1]  # the same float: harnesses compare them
    await until(lambda: all_free(engine))


async def test_cached_positions_are_computed_again(cluster):
    engine = await start(cluster)
    prompt = random_tokens(random.Random(0), 33)
    await collect(engine, request(prompt))
    answer = (await collect(engine, request(prompt, num_prompt_logprobs=0)))[0]
    check_prompt(answer, prompt)
    assert answer.cached_prompt_tokens == 0
    assert all(entry.top == () for entry in answer.prompt_logprobs)
    again = (await collect(engine, request(prompt)))[0]
    assert again.cached_prompt_tokens == 32


async def test_nothing_generated(cluster):
    engine = await start(cluster)
    rng = random.Random(1)
    for length in (1, 2, 4, 5, 30):
        prompt = random_tokens(rng, length)
        answer = (await collect(engine, request(prompt, max_tokens=0, num_prompt_logprobs=1)))[0]
        check_prompt(answer, prompt)
        assert (answer.token_ids, answer.text, answer.finish_reason.value) == ([], "", "length")
    await until(lambda: all_free(engine))


async def test_several_choices_score_the_prompt_once(cluster):
    engine = await start(cluster)
    prompt = random_tokens(random.Random(2), 21)
    answers = await collect(engine, request(prompt, num_choices=3, num_prompt_logprobs=0, temperature=1.0, seed=3))
    check_prompt(answers[0], prompt)
    assert [answers[index].prompt_logprobs for index in (1, 2)] == [None, None]


@pytest.mark.parametrize("cache", [True, False])
async def test_continuations_of_one_context(cluster, cache):
    engine = await start(cluster, max_step_tokens=16)
    rng = random.Random(3)
    for length in (1, 3, 4, 5, 30):
        continuations = [random_tokens(rng, rng.randrange(1, 12)) for _ in range(40)]
        what = score_request(random_tokens(rng, length), continuations, num_logprobs=1, use_prefix_cache=cache)
        other = asyncio.create_task(collect(engine, request(what.context_token_ids, max_tokens=30)))
        check_scores(await score(engine, what), what)
        assert (await other)[0].token_ids == expected_tokens(what.context_token_ids, 30, num_stages=3)
    # What branches wrote is nobody's prefix: the same tokens as a prompt give the same answer as ever.
    longest = what.context_token_ids + max(what.continuations, key=len)
    answer = (await collect(engine, request(longest, max_tokens=9)))[0]
    assert answer.token_ids == expected_tokens(longest, 9, num_stages=3)
    await until(lambda: all_free(engine))


async def test_a_continuation_costs_its_own_tokens(cluster):
    """1,000 continuations cost little more than the context once and themselves, in tokens that stages compute."""
    engine = await start(cluster, num_blocks=400)
    computed = []
    first, inner = cluster.stages[0].runner, cluster.stages[0].runner.execute
    first.execute = lambda batch, *more: computed.append(len(batch.token_ids)) or inner(batch, *more)
    rng = random.Random(4)
    what = score_request(random_tokens(rng, 130), [random_tokens(rng, 1 + at % 9) for at in range(1000)])
    check_scores(await score(engine, what), what)
    needed = len(what.context_token_ids) + sum(len(one) - 1 for one in what.continuations)
    assert needed <= sum(computed) <= 1.2 * needed + BLOCK_TOKENS


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_stage_dies_in_between(cluster, which):
    engine = await start(cluster, delay_s=0.004, max_step_tokens=8)
    rng = random.Random(which)
    prompts = [random_tokens(rng, 60) for _ in range(6)]
    what = score_request(random_tokens(rng, 30), [random_tokens(rng, 1 + at % 7) for at in range(60)])
    tasks = [
        asyncio.create_task(collect(engine, request(prompt, max_tokens=3, num_prompt_logprobs=1))) for prompt in prompts
    ]
    scores = asyncio.create_task(score(engine, what))
    for _ in range(2):
        await asyncio.sleep(0.1)
        assert not scores.done()
        dead = cluster.stages[which]
        await cluster.kill(dead)
        await until(lambda: engine.pipelines()[0].state == "recovering")
        replacement = await cluster.add_stage(
            dead.runner.layers.start_layer, dead.runner.layers.end_layer, delay_s=0.004
        )
        cluster.stages.remove(replacement)
        cluster.stages.insert(which, replacement)
    for prompt, task in zip(prompts, tasks, strict=True):
        answer = (await task)[0]
        check_prompt(answer, prompt)
        assert answer.token_ids == expected_tokens(prompt, 3, num_stages=3)
    check_scores(await scores, what)
    await until(lambda: all_free(engine))


async def test_preempted_in_a_small_cache(cluster):
    engine = await start(cluster, num_blocks=14, max_step_tokens=8)
    rng = random.Random(5)
    prompts = [random_tokens(rng, 20) for _ in range(8)]
    scored = [collect(engine, request(prompt, max_tokens=20, num_prompt_logprobs=0)) for prompt in prompts]
    what = score_request(random_tokens(rng, 10), [random_tokens(rng, 1 + at % 5) for at in range(30)])
    *answers, scores = await asyncio.gather(*scored, score(engine, what))
    for prompt, answer in zip(prompts, answers, strict=True):
        check_prompt(answer[0], prompt)
        assert answer[0].token_ids == expected_tokens(prompt, 20, num_stages=3)
    check_scores(scores, what)


async def test_what_fails_fails_alone(cluster):
    engine = await start(cluster, delay_s=0.002)
    for stage in cluster.stages:
        stage.runner.nan_token = 7
    good = request([1, 2, 3], num_prompt_logprobs=0)
    for bad in (collect(engine, request([1, 7, 3], num_prompt_logprobs=0)), score(engine, score_request([7], [[1]]))):
        with pytest.raises(InternalError) as error:
            await bad
        assert error.value.reason == "NON_FINITE_LOGITS"
        check_prompt((await collect(engine, good))[0], [1, 2, 3])
    with pytest.raises(InvalidArgumentError):
        await score(engine, score_request([1] * 300, [[1]]))
    loop = asyncio.get_running_loop()
    late = score_request([1] * 8, [[1] * 8] * 2000, deadline_s=loop.time() + 0.1)
    with pytest.raises(DeadlineExceededError):
        await score(engine, late)
    await until(lambda: all_free(engine))
