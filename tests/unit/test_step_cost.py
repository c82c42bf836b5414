"""What the scheduler learns from how long steps took."""

from __future__ import annotations

import random

import pytest

from gateway.scheduler.filling import num_chunks, num_groups, ramp
from gateway.scheduler.step_cost import StepCosts, StepTiming


def observe(costs: StepCosts, seconds: float, *, decodes: int = 0, tokens: int = 0, context: int = 0) -> None:
    timing = StepTiming(slowest_stage_s=seconds, overhead_s=0.002)
    costs.observe(timing, num_decodes=decodes, prefill_tokens=tokens, prefill_pairs=tokens * context)


def test_nothing_is_known_before_anything_was_measured() -> None:
    costs = StepCosts()
    assert costs.fixed_s is costs.overhead_s is costs.decode_s(4) is costs.prefill_token_s(0) is None
    assert costs.most_prefill_tokens(num_decodes=4, slowdown=2, context_tokens=0) is None


def test_prefill_costs_what_decode_rows_do_not_explain() -> None:
    costs, rng = StepCosts(), random.Random(1)
    for _ in range(200):
        decodes = rng.randint(1, 16)
        observe(costs, 0.03 + 0.001 * decodes, decodes=decodes)
    for _ in range(200):
        tokens, context = rng.randint(16, 500), rng.randint(0, 4000)
        observe(costs, 0.03 + 0.008 + tokens * (0.002 + 1e-6 * context), decodes=8, tokens=tokens, context=context)
    assert costs.fixed_s == pytest.approx(0.031, rel=0.05)
    assert costs.decode_s(16) == pytest.approx(0.046, rel=0.1)
    assert costs.prefill_token_s(0) == pytest.approx(0.002, rel=0.1)
    assert costs.prefill_token_s(4000) == pytest.approx(0.006, rel=0.1)
    most = costs.most_prefill_tokens(num_decodes=8, slowdown=2, context_tokens=1000)
    assert most == pytest.approx(0.038 / 0.003, rel=0.15)


def test_long_decoding_does_not_forget_what_prefill_costs() -> None:
    costs = StepCosts()
    observe(costs, 0.2, tokens=100)
    for _ in range(10_000):
        observe(costs, 0.03, decodes=4)
    assert costs.prefill_token_s(0) == pytest.approx(0.002)


def test_steps_that_were_held_up_hardly_count() -> None:
    costs = StepCosts()
    for step in range(1000):
        observe(costs, 2.0 if step % 20 == 19 else 0.03, decodes=4)
    assert costs.decode_s(4) == pytest.approx(0.03, rel=0.1)


def test_the_largest_chunks_say_what_a_token_costs() -> None:
    costs = StepCosts()
    observe(costs, 0.03, tokens=1)  # a probe: all of it is the fixed part
    observe(costs, 1.0, tokens=500)
    assert costs.prefill_token_s(0) == pytest.approx(0.002, rel=0.02)


@pytest.mark.parametrize(("tokens", "context", "seconds"), [(100, 0, 0.0), (100, 1000, 0.01), (1, 1, 5.0)])
def test_costs_are_never_negative(tokens: int, context: int, seconds: float) -> None:
    costs = StepCosts()
    observe(costs, 0.1, decodes=1)
    for turn in range(5):
        observe(costs, seconds / (1 + turn), decodes=1, tokens=tokens, context=context * (turn % 2))
        for at in (0, 10_000):
            assert (costs.prefill_token_s(at) or 0) >= 0


def test_num_groups() -> None:
    assert num_groups(num_stages=4, fixed_s=None, overhead_s=None) == 4
    assert num_groups(num_stages=4, fixed_s=0.02, overhead_s=0.019) == 4
    assert num_groups(num_stages=4, fixed_s=0.02, overhead_s=0.021) == 5


def test_num_chunks() -> None:
    assert num_chunks(backlog_tokens=4096, num_stages=1, fixed_s=0.03, token_s=0.002) == 1
    assert num_chunks(backlog_tokens=4096, num_stages=4, fixed_s=0.03, token_s=0.002) == 29
    assert num_chunks(backlog_tokens=4096, num_stages=4, fixed_s=0.03, token_s=None) is None


def test_ramp() -> None:
    assert ramp(40, []) == 40
    assert ramp(40, [0, 0, 10]) == 10
    assert ramp(40, [10, 20, 10]) == 20
    assert ramp(40, [35, 40]) == 40
