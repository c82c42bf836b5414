"""Random workloads on a simulated pipeline whose stages remember what they wrote into every KV slot."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from simulated_pipeline import SimulatedPipeline

SimulatedPipeline.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
TestSimulatedPipeline = SimulatedPipeline.TestCase


def run_workload(seed: int) -> tuple[int, int]:
    """A long, busy run, deeper than what hypothesis explores. Returns preemptions and cached prompt tokens."""
    rng = random.Random(seed)
    pipeline = SimulatedPipeline()
    num_blocks = rng.randint(6, 24)
    pipeline.start(
        num_blocks=num_blocks,
        block_size=rng.randint(1, 5),
        max_step_tokens=rng.choice([1, 7, 24, 100]),
        max_step_sequences=rng.choice([1, 3, 8]),
        max_in_flight=rng.randint(1, 5),
        num_stages=rng.randint(1, 4),
        min_prefill_tokens=rng.randint(1, 8),
        max_request_kv_fraction=rng.choice([0.3, 0.5, 1.0]),
        prefix_caching=rng.random() < 0.8,
    )
    may_disturb = rng.random() < 0.5
    for _ in range(300):
        action = rng.random()
        if action < 0.15:
            pipeline.add(
                num_prompt=rng.randint(1, 12),
                num_resumed=rng.choice([0, 0, 3]),
                max_tokens=rng.randint(1, 25),
                priority=rng.choice([0, 0, 0, 1, -1]),
                prefix=rng.randrange(2),
                differs_from=rng.choice([0, 5, 12]),
                who=rng.choice(["", "", "", "tenant", "salt", "no cache"]),
                request_key=rng.choice([None, None, 1, 2]),
            )
        elif action < 0.6:
            pipeline.send()
        elif action < 0.96 and pipeline.flying:
            pipeline.receive(stops=rng.randint(0, 60), seconds=rng.random())
        elif may_disturb and action > 0.985 and pipeline.live:
            pipeline.cancel(pick=rng.randrange(100))
        elif may_disturb and action > 0.97 and pipeline.flying:
            pipeline.fail()
        elif may_disturb and action > 0.966:
            pipeline.reset(num_blocks=rng.randint(6, 24))
        elif may_disturb and action > 0.963 and pipeline.live:
            pipeline.run_alone(pick=rng.randrange(100))
        if rng.random() < 0.05 and pipeline.live:
            pipeline.hold(pick=rng.randrange(100))
        elif rng.random() < 0.1:
            pipeline.let_go()
        pipeline.holds()
    pipeline.teardown()
    return pipeline.scheduler.num_preemptions, pipeline.num_cached_tokens


@pytest.mark.parametrize("first_seed", [0, 100, 200])
def test_every_request_of_long_random_workloads_ends(first_seed: int) -> None:
    runs = [run_workload(seed) for seed in range(first_seed, first_seed + 100)]
    assert sum(num_preemptions > 0 for num_preemptions, _ in runs) > 20, "the workloads do not fill the cache"
    assert sum(num_cached_tokens > 0 for _, num_cached_tokens in runs) > 40, "the workloads share no prefixes"
