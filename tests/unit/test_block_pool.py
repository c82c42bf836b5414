"""KV blocks: known holders, rest until nothing touches them, and content that can be shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.scheduler import BlockPool
from gateway.scheduler.prefix import KEY_BYTES, next_key, root_key


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
    pool.free(blocks, last_step=8)
    assert (pool.num_free, pool.num_quarantined) == (1, 2)
    assert not any(pool.may_be_given(block) for block in blocks)
    pool.step_returned(7)
    assert (pool.num_free, pool.num_quarantined) == (1, 2)
    pool.step_returned(8)
    assert (pool.num_free, pool.num_quarantined) == (3, 0)
    pool.check_integrity(others)


def test_a_block_freed_after_its_last_step_returned_is_free_at_once() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.step_returned(3)
    pool.free(blocks, last_step=3)
    assert (pool.num_free, pool.num_quarantined) == (2, 0)


def test_double_free_is_our_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed but not held"):
        pool.free(blocks)


def test_integrity_notices_a_lost_block_and_a_second_holder() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="lost, or is in two places"):
        pool.check_integrity(blocks[:1])
    with pytest.raises(AssertionError, match="miscounted"):
        pool.check_integrity([*blocks, blocks[0]])


def test_a_published_block_is_shared_cached_and_found_again() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    assert pool.find(b"a") == block
    pool.share(block)
    pool.free([block])
    pool.check_integrity([block])
    pool.free([block])
    assert (pool.num_free, pool.num_cached) == (3, 1)
    assert pool.counts_as_free(block)
    pool.share(block)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.check_integrity([block])


def test_a_shared_block_rests_for_the_steps_of_all_its_holders() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.share(block)
    pool.free([block], last_step=9)  # this holder was cancelled; step 9 still reads the block
    pool.free([block], last_step=5)
    pool.step_returned(5)
    assert not pool.may_be_given(block)
    pool.step_returned(9)
    assert pool.may_be_given(block)


def test_a_resting_block_can_be_shared_and_rests_again() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.free([block], last_step=2)
    pool.share(block)
    assert pool.num_quarantined == 0
    pool.free([block], last_step=4)
    pool.step_returned(2)
    assert not pool.may_be_given(block)
    pool.check_integrity([])
    pool.step_returned(4)
    pool.check_integrity([])
    assert pool.num_cached == 1


def test_the_least_recently_used_prefix_is_forgotten_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(5)
    old, new = pool.allocate(2), pool.allocate(2)
    for name, blocks in ((b"old", old), (b"new", new)):
        for index, block in enumerate(blocks):
            pool.publish(block, name + bytes([index]))
    pool.free(old)
    pool.free(new)
    assert pool.num_free == 5
    pool.allocate(2)  # the one that was never used, and one more
    assert [pool.find(name) is None for name in (b"old\0", b"old\1", b"new\0", b"new\1")] == [False, True, False, False]
    pool.allocate(2)
    assert [pool.find(name) is None for name in (b"old\0", b"old\1", b"new\0", b"new\1")] == [True, True, False, True]


def test_the_second_block_of_the_same_content_is_not_published() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find(b"a") == first
    pool.free([second])
    assert pool.num_cached == 0
    pool.check_integrity([first])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.booleans(), st.booleans()), max_size=20),
    st.lists(st.integers(0, 19), max_size=6),
)
def test_when_everything_returned_everything_is_free(
    frees: list[tuple[int, int, bool, bool]], pauses: list[int]
) -> None:
    pool = BlockPool(80)
    held: list[int] = []
    returned = 0
    for number, (num_blocks, last_step, published, shared) in enumerate(frees):
        blocks = pool.allocate(min(num_blocks, pool.num_free))
        for index, block in enumerate(blocks):
            if published:
                pool.publish(block, bytes([number, index]))
                if shared:
                    pool.share(block)
                    held.append(block)
        pool.free(blocks, last_step=last_step)
        pool.check_integrity(held)
        for block in blocks:
            if last_step > returned:
                assert not pool.may_be_given(block)
        if number in pauses:
            returned += 1
            pool.step_returned(returned)
    pool.free(held)
    for step_id in range(returned + 1, 7):
        pool.step_returned(step_id)
    pool.check_integrity([])
    assert pool.num_free == 80


def test_keys_depend_on_everything_before_and_on_who_shares() -> None:
    root = root_key("", "")
    assert len(root) == KEY_BYTES
    keys = {
        root,
        root_key("a", ""),
        root_key("", "a"),
        root_key("ab", "c"),
        root_key("a", "bc"),
        next_key(root, (1, 2)),
        next_key(root, (2, 1)),
        next_key(next_key(root, (1,)), (2,)),
        next_key(root_key("a", ""), (1, 2)),
    }
    assert len(keys) == 9
    assert next_key(root, (1, 2)) == next_key(root, (1, 2))
