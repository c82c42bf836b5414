"""Who holds which KV block, which blocks must rest before they are used again, and which hold a reusable prefix."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

_FREE, _HELD, _RESTING, _CACHED = 0, 1, 2, 3


class BlockPool:
    """KV blocks 0..num_blocks-1, the same on every stage of a pipeline.

    A block is free, held (by one sequence or, shared, by several), resting, or cached: held by nobody, but its content is
    known by a key and can be shared again until the block is needed for something else (least recently used first).

    A block that nobody holds any more rests until every micro-batch that touched it has returned: a stage that runs such a
    micro-batch late, or again after a reconnect, would write into (or read from) a block that meanwhile belongs to another
    sequence. Micro-batches return in the order of their step ids, so the last one that touched a block decides. A new
    epoch gets a new pool: no micro-batch of an older epoch is ever executed, and what was cached is not rebuilt.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest in the caches
        self._cached: OrderedDict[int, None] = OrderedDict()  # an ordered set, least recently used first
        self._resting: dict[int, list[int]] = {}  # by the step that they wait for
        self._num_resting = 0
        self._last_returned_step = 0
        self._state = bytearray(num_blocks)
        self._num_holders = array("i", [0]) * num_blocks
        self._last_step = array("q", [0]) * num_blocks  # the last step known to touch each block, as its holders told
        self._block_by_key: dict[bytes, int] = {}
        self._key_by_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give now, the cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can be shared."""
        return len(self._cached)

    @property
    def num_quarantined(self) -> int:
        """Blocks that become free when micro-batches now in flight return."""
        return self._num_resting

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks; the caller has checked `num_free`. Cached ones are forgotten last."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free"
        while len(self._free) < num_blocks:
            block, _ = self._cached.popitem(last=False)
            del self._block_by_key[self._key_by_block.pop(block)]
            self._free.insert(0, block)
        blocks = self._free[len(self._free) - num_blocks :]
        del self._free[len(self._free) - num_blocks :]
        blocks.reverse()
        for block in blocks:
            self._state[block] = _HELD
            self._num_holders[block] = 1
        return blocks

    def free(self, blocks: Iterable[int], *, last_step: int = 0) -> None:
        """A holder gives blocks back; `last_step` is the last micro-batch in which it touched them (0: none).

        A block with no other holder rests until that micro-batch has returned. Then it is cached if it was published.
        """
        for block in reversed(
            list(blocks)
        ):  # the end of a prefix is of no use without its beginning: it is evicted first
            assert self._state[block] == _HELD, f"block {block} is freed but not held"
            self._num_holders[block] -= 1
            self._last_step[block] = max(self._last_step[block], last_step)
            if self._num_holders[block] == 0:
                self._rest(block)

    def step_returned(self, step_id: int) -> None:
        """A micro-batch came back: blocks that waited for it are free or cached."""
        self._last_returned_step = step_id
        for block in self._resting.pop(step_id, ()):
            # It may have been shared again meanwhile, and may rest again for a later step.
            if self._state[block] == _RESTING and self._last_step[block] == step_id:
                self._num_resting -= 1
                self._release(block)

    def publish(self, block: int, key: bytes) -> None:
        """The content of a held block is complete and known by `key`; ignored where another block has that key already."""
        assert self._state[block] == _HELD
        if key not in self._block_by_key and block not in self._key_by_block:
            self._block_by_key[key] = block
            self._key_by_block[block] = key

    def find(self, key: bytes) -> int | None:
        """The block that holds this content, if there is one."""
        return self._block_by_key.get(key)

    def counts_as_free(self, block: int) -> bool:
        """Whether sharing this published block takes one from `num_free`."""
        return self._state[block] == _CACHED

    def share(self, block: int) -> None:
        """One more holder of a published block."""
        assert block in self._key_by_block
        if self._state[block] == _CACHED:
            del self._cached[block]
        elif self._state[block] == _RESTING:
            self._num_resting -= 1
        self._state[block] = _HELD
        self._num_holders[block] += 1

    def may_be_given(self, block: int) -> bool:
        """Whether `allocate` could give this block now."""
        return self._state[block] in (_FREE, _CACHED)

    def _rest(self, block: int) -> None:
        last_step = self._last_step[block]
        if last_step > self._last_returned_step:
            self._state[block] = _RESTING
            self._num_resting += 1
            self._resting.setdefault(last_step, []).append(block)
        else:
            self._release(block)

    def _release(self, block: int) -> None:
        if block in self._key_by_block:
            self._state[block] = _CACHED
            self._cached[block] = None
        else:
            self._state[block] = _FREE
            self._free.append(block)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Every block is free, cached, resting, or held as often as `held` names it; raises AssertionError."""
        holders = Counter(held)
        resting = {
            block
            for step_id, blocks in self._resting.items()
            for block in blocks
            if self._state[block] == _RESTING and self._last_step[block] == step_id
        }
        assert len(resting) == self._num_resting, f"{len(resting)} blocks rest, {self._num_resting} are counted"
        everything = sorted([*self._free, *self._cached, *resting, *holders])
        assert everything == list(range(self.num_blocks)), "a block is lost, or is in two places"
        for blocks, state in (
            (self._free, _FREE),
            (self._cached, _CACHED),
            (resting, _RESTING),
            (holders, _HELD),
        ):
            assert all(self._state[block] == state for block in blocks), "the state of a block is wrong"
        assert all(self._num_holders[block] == holders[block] for block in range(self.num_blocks)), (
            "holders are miscounted"
        )
        assert all(step_id > self._last_returned_step for step_id in self._resting), "a block rests for ever"
        assert {block: key for key, block in self._block_by_key.items()} == self._key_by_block
        assert self._cached.keys() <= self._key_by_block.keys()
        assert not self._key_by_block.keys() & set(self._free), "a free block is still published"
