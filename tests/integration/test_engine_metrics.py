"""What the engine counts, and that it looks for leaks when it is idle."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

import pytest
from engine_helpers import NUM_LAYERS, Cluster, collect, request, until

from stageline.errors import DeadlineExceededError, ResourceExhaustedError


@pytest.fixture
async def cluster():
    running = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await running.add_stage(start, end, delay_s=0.004)
    yield running
    await running.stop()


def values(engine) -> dict[str, float]:
    """Every sample without the model's name: `name{labels}` → value."""
    found = {}
    for family in engine.metrics.registry.collect():
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name")
            found[sample.name.removeprefix("stageline:") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


async def test_requests_tokens_and_their_ends_are_counted(cluster):
    engine = await cluster.start(max_waiting_sequences=4)
    await until(engine.ready)
    await collect(engine, request(range(10), max_tokens=8, num_choices=2))
    await collect(engine, request(range(10), max_tokens=5))
    async with aclosing(engine.generate(request([5], max_tokens=100))) as deltas:
        await anext(deltas)
    with pytest.raises(ResourceExhaustedError):
        await collect(engine, request([1], max_tokens=50, num_choices=40))
    with pytest.raises(DeadlineExceededError):
        await collect(engine, request([1], max_tokens=190, deadline_s=asyncio.get_running_loop().time() + 1.0))
    await until(lambda: values(engine)["invariant_checks_total"] >= 1)
    seen = values(engine)
    assert seen["request_success_total{finished_reason=length}"] == 3
    assert seen["requests_cancelled_total"] == 1
    assert seen["requests_rejected_total{reason=QUEUE_FULL}"] == 1
    assert seen["request_failures_total{reason=DEADLINE_EXCEEDED}"] == 1
    # The canary is no request; those that were cut short may have got more than we saw.
    assert seen["time_to_first_token_seconds_count"] == 5
    assert seen["e2e_request_latency_seconds_count"] == 3
    assert seen["generation_tokens_total"] == seen["inter_token_latency_seconds_count"] + 5 >= 2 * 8 + 5 + 1
    assert seen["prompt_tokens_total"] == 10 + 10 + 10 + 1 + 1
    assert seen["prompt_tokens_cached_total"] >= 8, "two blocks of the prompt that came again"
    assert 0 < seen["time_to_first_token_seconds_sum"] < 50
    assert seen["num_requests_running{pipeline=0}"] == seen["num_requests_waiting{pipeline=0}"] == 0
    assert seen["kv_cache_usage_perc{pipeline=0}"] == 0
    assert seen["pipeline_ready{pipeline=0}"] == 1
    assert seen["invariant_violations_total"] == 0


async def test_a_recovery_is_counted(cluster):
    engine = await cluster.start()
    await until(engine.ready)
    assert values(engine)["num_recoveries_total{pipeline=0}"] == 0
    await cluster.kill(cluster.stages[0])
    await cluster.add_stage(0, 2)
    await until(lambda: values(engine)["num_recoveries_total{pipeline=0}"] == 1)
    assert engine.ready()


async def test_a_leak_is_counted_each_time_and_logged_once(cluster, caplog):
    engine = await cluster.start(check_integrity=False)
    await until(engine.ready)
    await until(lambda: not engine._keeper.lanes[0].busy)
    engine._keeper.lanes[0].scheduler._pool.allocate(2)  # nobody will give them back
    with caplog.at_level(logging.CRITICAL, "stageline.gateway"):
        for times in (1, 2):
            await collect(engine, request([1, 2], max_tokens=3))
            await until(lambda times=times: values(engine)["invariant_checks_total"] == times)
    assert values(engine)["invariant_violations_total"] >= 2 * 2, "blocks that are not free, and books that are wrong"
    assert caplog.text.count("2 KV blocks are not free") == 1
    assert engine.leaks()


async def test_a_full_queue_is_known_before_a_request_is_read(cluster):
    engine = await cluster.start(max_waiting_sequences=3, max_step_sequences=1)
    await until(engine.ready)
    engine.check_room()
    tasks = [asyncio.create_task(collect(engine, request([i], max_tokens=100))) for i in range(3)]
    await until(lambda: values(engine)["num_requests_running{pipeline=0}"] >= 1)
    for i in range(3):
        tasks.append(asyncio.create_task(collect(engine, request([i], max_tokens=100))))
        await asyncio.sleep(0)
    await until(lambda: values(engine)["num_requests_waiting{pipeline=0}"] == 3)
    rejected = "requests_rejected_total{reason=QUEUE_FULL}"
    before = values(engine).get(rejected, 0)
    with pytest.raises(ResourceExhaustedError) as caught:
        engine.check_room()
    assert caught.value.reason == "QUEUE_FULL"
    assert float(caught.value.metadata["retry_after_s"]) > 0
    assert values(engine)[rejected] == before + 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    engine.check_room()


async def test_a_sequence_that_goes_on_without_its_request_is_a_leak(cluster, monkeypatch):
    engine = await cluster.start()
    await until(engine.ready)
    monkeypatch.setattr(engine, "_end", lambda choices, error: None)  # the bug
    async with aclosing(engine.generate(request([5], max_tokens=190))) as deltas:
        await anext(deltas)
    await until(lambda: values(engine)["invariant_violations_total"] == 1, 3.0)
    assert engine._keeper.lanes[0].busy, "found while it still runs"
