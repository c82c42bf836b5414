"""The engine over real stage servers that run a toy model: outputs, stops, choices, cancellation, errors."""

from __future__ import annotations

import asyncio
import math
import random
import time
from itertools import pairwise

import numpy as np
import pytest
from engine_helpers import (
    EOS,
    NUM_LAYERS,
    Cluster,
    all_free,
    byte_tokenizer,
    collect,
    expected_tokens,
    logits_of,
    prefix_hashes,
    request,
    until,
)

from gateway.types import FinishReason
from stageline.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)


async def ready(cluster: Cluster, cuts: tuple[int, ...] = (0, 2, NUM_LAYERS), settings=None, **options):
    for start, end in pairwise(cuts):
        await cluster.add_stage(start, end, **options)
    engine = await cluster.start(**(settings or {}))
    async with asyncio.timeout(10):
        await engine.wait_ready()
    return engine


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4), (0, 1, 2, 4)])
async def test_many_requests_get_the_models_own_tokens(cluster, cuts):
    engine = await ready(cluster, cuts, settings={"max_step_tokens": 24, "max_step_sequences": 4}, num_blocks=48)
    rng = random.Random(len(cuts))
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 40))) for _ in range(24)]
    counts = [rng.randrange(1, 24) for _ in prompts]
    answers = await asyncio.gather(
        *(collect(engine, request(p, max_tokens=n)) for p, n in zip(prompts, counts, strict=True))
    )
    for prompt, count, answer in zip(prompts, counts, answers, strict=True):
        assert answer[0].token_ids == expected_tokens(prompt, count, num_stages=len(cuts) - 1)
        assert answer[0].finish_reason is FinishReason.LENGTH
    await until(lambda: all_free(engine))


async def test_text_is_the_decoding_of_the_tokens(cluster):
    engine = await ready(cluster)
    answer = (await collect(engine, request([1, 2], max_tokens=60)))[0]
    assert answer.text == byte_tokenizer().decode(answer.token_ids)


async def test_stop_token_ends_and_min_tokens_suppresses_it(cluster):
    engine = await ready(cluster)
    plain = expected_tokens([7], 12, num_stages=2)
    stop = plain[4]
    first = plain.index(stop)
    answer = (await collect(engine, request([7], max_tokens=12, stop_token_ids=(stop,))))[0]
    assert answer.token_ids == plain[: first + 1]
    assert answer.finish_reason is FinishReason.STOP
    assert answer.text == byte_tokenizer().decode(plain[:first])
    later = (await collect(engine, request([7], max_tokens=12, min_tokens=12, stop_token_ids=(stop,))))[0]
    assert later.token_ids == expected_tokens([7], 12, num_stages=2, suppressed=[stop])
    assert later.finish_reason is FinishReason.LENGTH


async def test_end_token_names_itself(cluster):
    engine = await ready(cluster)
    answer = (await collect(engine, request([3], logit_bias=((EOS, 100.0),), eos_token_ids=(EOS,))))[0]
    assert (answer.token_ids, answer.text, answer.matched_stop) == ([EOS], "", "<end>")
    ignored = (await collect(engine, request([3], logit_bias=((EOS, 100.0),), max_tokens=3)))[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 3, FinishReason.LENGTH)


def ascii_run() -> tuple[list[int], list[int], str]:
    """A prompt whose answer has three printable characters in a row: (prompt, tokens, those characters)."""
    tokenizer = byte_tokenizer()
    for first in range(256):
        tokens = expected_tokens([first], 20, num_stages=2)
        for place in range(2, 17):
            run = [tokenizer.token_bytes(token) for token in tokens[place : place + 3]]
            if all(32 < byte[0] < 127 for byte in run) and len(set(run)) == 3:
                return [first], tokens, b"".join(run).decode()
    raise AssertionError("the toy never says three printable characters")


@pytest.mark.parametrize("include", [False, True])
async def test_stop_string_over_several_tokens(cluster, include):
    prompt, tokens, stop = ascii_run()
    engine = await ready(cluster)
    answer = (await collect(engine, request(prompt, max_tokens=20, stop_strings=(stop,), include_stop_string=include)))[
        0
    ]
    text = byte_tokenizer().decode(tokens)
    end = text.index(stop) + (len(stop) if include else 0)
    assert (answer.text, answer.matched_stop, answer.finish_reason) == (text[:end], stop, FinishReason.STOP)
    assert answer.token_ids == tokens[: len(answer.token_ids)]
    early = (await collect(engine, request(prompt, max_tokens=20, min_tokens=20, stop_strings=(stop,))))[0]
    assert (early.token_ids, early.text) == (tokens, text)


async def test_choices_have_their_own_draws_and_a_resumed_one_goes_on_alike(cluster):
    engine = await ready(cluster)
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 20, "repetition_penalty": 1.3, "presence_penalty": 0.2}
    answers = await collect(engine, request([1, 2, 3], num_choices=4, **params))
    assert sorted(answers) == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 4
    head = tuple(answers[2].token_ids[:8])
    resumed = await collect(engine, request([1, 2, 3], first_choice=2, resume_token_ids=head, **params))
    assert resumed[2].token_ids == answers[2].token_ids[8:]
    assert resumed[2].finish_reason is FinishReason.LENGTH
    await until(lambda: all_free(engine))


async def test_resume_of_what_has_ended_ends_at_once(cluster):
    engine = await ready(cluster)
    answer = (await collect(engine, request([1], resume_token_ids=(9, EOS), eos_token_ids=(EOS,), max_tokens=8)))[0]
    assert (answer.token_ids, answer.finish_reason) == ([], FinishReason.STOP)


async def test_logprobs_are_the_models_own(cluster):
    engine = await ready(cluster)
    answer = (await collect(engine, request([4, 5], max_tokens=1, num_logprobs=3, temperature=0.0)))[0]
    logits = logits_of(prefix_hashes(prefix_hashes([4, 5]))[-1]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    entry = answer.logprobs[0]
    assert entry.token_id == answer.token_ids[0] == int(logits.argmax())
    assert math.isclose(entry.logprob, logprobs.max(), abs_tol=1e-5)
    assert [token for token, _ in entry.top] == np.argsort(-logits, kind="stable")[:3].tolist()


async def test_leaving_in_the_middle_frees_the_blocks(cluster):
    engine = await ready(cluster, delay_s=0.005)
    streams = [engine.generate(request([i], max_tokens=150, num_choices=2)) for i in range(6)]
    for stream in streams:
        await anext(stream)
    assert not all_free(engine)
    for stream in streams:
        await stream.aclose()
    await until(lambda: all_free(engine), 2.0)
    assert engine.pipelines()[0].num_running_sequences == 0


async def test_deadline(cluster):
    engine = await ready(cluster, delay_s=0.01)
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await collect(engine, request([1], max_tokens=190, deadline_s=started + 0.2))
    assert time.monotonic() - started < 1.0
    await until(lambda: all_free(engine), 2.0)


async def test_deadline_holds_while_no_pipeline_is_ready(cluster):
    engine = await cluster.start()
    assert not engine.ready()
    with pytest.raises(DeadlineExceededError):
        await collect(engine, request([1], deadline_s=time.monotonic() + 0.1))


async def test_a_request_waits_for_the_first_pipeline(cluster):
    engine = await cluster.start()
    waiting = asyncio.create_task(collect(engine, request([1, 2])))
    await cluster.add_stage(0, 2)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await cluster.add_stage(2, NUM_LAYERS)
    assert (await waiting)[0].token_ids == expected_tokens([1, 2], 16, num_stages=2)


async def test_step_error_fails_its_requests_and_no_others(cluster):
    engine = await ready(cluster, fail_token=255)
    with pytest.raises(InternalError, match="toy failure") as failure:
        await collect(engine, request([255, 1]))
    assert failure.value.metadata["stage"] == "0-2"
    assert (await collect(engine, request([1])))[0].token_ids == expected_tokens([1], 16, num_stages=2)
    assert engine.pipelines()[0].epoch == 1, "the pipeline was not broken"
    await until(lambda: all_free(engine))


async def test_nan_fails_its_request_and_not_its_neighbours(cluster):
    engine = await ready(cluster, nan_token=254, delay_s=0.01)
    clean = [i for i in range(20) if 254 not in expected_tokens([i], 16, num_stages=2)]
    neighbours = [asyncio.create_task(collect(engine, request([i]))) for i in clean]
    with pytest.raises(InternalError) as failure:
        await collect(engine, request([254]))
    assert failure.value.reason == "NON_FINITE_LOGITS"
    for index, answer in zip(clean, await asyncio.gather(*neighbours), strict=True):
        assert answer[0].token_ids == expected_tokens([index], 16, num_stages=2)


async def test_what_cannot_be_queued_is_refused(cluster):
    engine = await ready(cluster, settings={"max_waiting_sequences": 3}, num_blocks=8, delay_s=0.02)
    with pytest.raises(InvalidArgumentError) as too_long:
        await collect(engine, request([1], max_tokens=100))
    assert too_long.value.reason == "KV_CACHE_TOO_SMALL"
    with pytest.raises(ResourceExhaustedError) as full:
        await asyncio.gather(*(collect(engine, request(range(20), max_tokens=8)) for _ in range(8)))
    assert full.value.reason == "QUEUE_FULL"


async def test_stop_gives_the_stages_back_and_ends_requests(cluster):
    engine = await ready(cluster, delay_s=0.01)
    stream = engine.generate(request([1], max_tokens=190))
    await anext(stream)
    await engine.stop(0.0)
    with pytest.raises(UnavailableError):
        async for _ in stream:
            pass
    with pytest.raises(UnavailableError):
        await collect(engine, request([1]))
    assert not engine.ready()
    other = await cluster.start()  # another owner: it could not claim what is still owned
    async with asyncio.timeout(2):
        await other.wait_ready()


async def test_two_pipelines_share_the_load_and_a_lone_stage_is_a_spare(cluster):
    await cluster.add_stage(0, 2)
    engine = await ready(cluster, delay_s=0.005)
    await cluster.add_stage(2, NUM_LAYERS)
    await cluster.add_stage(0, 2)
    await until(lambda: [p.state for p in engine.pipelines()] == ["ready", "ready"])
    assert [spare.layers for spare in engine.spares()] == ["0-2"]
    tasks = [asyncio.create_task(collect(engine, request([i]))) for i in range(8)]
    await until(lambda: [p.num_running_sequences for p in engine.pipelines()] == [4, 4], 2.0)
    for index, answer in enumerate(await asyncio.gather(*tasks)):
        assert answer[0].token_ids == expected_tokens([index], 16, num_stages=2)
