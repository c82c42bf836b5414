"""Places for lines are shared among tenants, whoever came first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.shares import Shares, Waiting, next_batch


@pytest.mark.parametrize(
    ("served", "running", "expected"),
    [
        ({"a": 0.0, "b": 0.0}, {}, "a1"),  # level: the batch that came first
        ({"a": 10.0, "b": 0.0}, {}, "b1"),
        ({"a": 0.0, "b": 0.0}, {"a": 1}, "b1"),  # a line that runs will cost as much as others did
        ({"a": 0.0, "b": 10.0}, {"a": 1}, "a1"),
        ({"a": 0.0, "b": 10.0}, {"a": 3}, "b1"),
    ],
)
def test_the_tenant_that_was_served_least_is_next(served: dict, running: dict, expected: str) -> None:
    waiting = [Waiting("a1", "a"), Waiting("b1", "b"), Waiting("a2", "a"), Waiting("b2", "b")]
    assert next_batch(waiting, served.__getitem__, running, 5.0).batch_id == expected


def run(shares: Shares, batches: dict[Waiting, int], *, places: int, cost: dict[str, int], ends: int) -> Counter[str]:
    """Lines that ended of each tenant, after `ends` lines; the line that has run longest ends next."""
    left, running, done = dict(batches), list[Waiting](), Counter[str]()
    for _ in range(ends):
        while len(running) < places and (waiting := [batch for batch, lines in left.items() if lines]):
            batch = shares.next(waiting, Counter(one.tenant for one in running))
            left[batch] -= 1
            running.append(batch)
        if not running:
            break
        ended = running.pop(0)
        done[ended.tenant] += 1
        shares.charge(ended.tenant, prompt_tokens=cost[ended.tenant], output_tokens=0)
    return done


def test_a_long_batch_that_came_first_does_not_hold_up_a_short_one() -> None:
    shares, long, short = Shares(), Waiting("long", "a"), Waiting("short", "b")
    shares.update({"a"})
    run(shares, {long: 50_000}, places=32, cost={"a": 100}, ends=1_000)
    shares.update({"a", "b"})
    done = run(shares, {long: 49_000, short: 100}, places=32, cost={"a": 100, "b": 100}, ends=250)
    assert done["b"] == 100


@given(
    st.lists(st.integers(1, 400), min_size=2, max_size=5),
    st.integers(1, 16),
    st.lists(st.integers(1, 3), min_size=5, max_size=5),
)
def test_tenants_with_enough_to_do_get_the_same_tokens(costs: list[int], places: int, num_batches: list[int]) -> None:
    tenants = [f"t{i}" for i in range(len(costs))]
    cost = dict(zip(tenants, costs, strict=True))
    batches = {
        Waiting(f"{tenant}-{i}", tenant): 10_000
        for tenant, count in zip(tenants, num_batches, strict=False)
        for i in range(count)
    }
    shares = Shares()
    shares.update(set(tenants))
    done = run(shares, batches, places=places, cost=cost, ends=3_000)
    tokens = [done[tenant] * cost[tenant] for tenant in tenants]
    assert max(tokens) - min(tokens) <= 2 * (places + 1) * max(costs), "no further apart than what runs at a time"


def test_a_pause_earns_nothing() -> None:
    shares, a, b = Shares(), Waiting("a1", "a"), Waiting("b1", "b")
    shares.update({"a"})
    run(shares, {a: 1_000}, places=4, cost={"a": 10}, ends=1_000)
    shares.update({"a", "b"})  # b begins level with a
    done = run(shares, {a: 1_000, b: 1_000}, places=4, cost={"a": 10, "b": 10}, ends=200)
    assert abs(done["a"] - done["b"]) <= 8
