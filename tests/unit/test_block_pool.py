"""KV blocks: one owner each, and rest until nothing touches them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.scheduler import BlockPool


def test_allocates_every_block_once() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity(first + second)
    with pytest.raises(AssertionError, match="1 blocks asked, 0 free"):
        pool.allocate(1)


def test_freed_blocks_rest_until_the_last_step_that_touched_them_returned() -> None:
    pool = BlockPool(4)
    blocks, others = pool.allocate(2), pool.allocate(1)
    pool.free(blocks, still_touched_by=[7, 8])
    assert (pool.num_free, pool.num_quarantined) == (1, 2)
    assert pool.is_quarantined(blocks)
    pool.step_returned(7)
    pool.step_returned(6)
    assert (pool.num_free, pool.num_quarantined) == (1, 2)
    pool.step_returned(8)
    assert (pool.num_free, pool.num_quarantined) == (3, 0)
    pool.check_integrity(others)


def test_double_free_is_our_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed but not owned"):
        pool.free(blocks)


def test_integrity_notices_a_lost_block_and_a_second_owner() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    for owned in (blocks[:1], [*blocks, blocks[0]]):
        with pytest.raises(AssertionError, match="lost, or has two owners"):
            pool.check_integrity(owned)


@given(st.lists(st.tuples(st.integers(1, 4), st.sets(st.integers(1, 6))), max_size=20), st.permutations(range(1, 7)))
def test_any_order_of_returns_frees_everything(frees: list[tuple[int, set[int]]], returns: list[int]) -> None:
    pool = BlockPool(80)
    quarantined: list[tuple[list[int], set[int]]] = []
    for num_blocks, steps in frees:
        blocks = pool.allocate(num_blocks)
        pool.free(blocks, still_touched_by=steps)
        if steps:
            quarantined.append((blocks, set(steps)))
    for step_id in returns:
        pool.step_returned(step_id)
        for blocks, steps in quarantined:
            steps.discard(step_id)
            if steps:
                assert pool.is_quarantined(blocks)
        assert pool.num_quarantined == sum(len(blocks) for blocks, steps in quarantined if steps)
        pool.check_integrity([])
    assert pool.num_free == 80
