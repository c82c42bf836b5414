"""Who owns which KV block, and which blocks must rest before they are used again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FREE, _OWNED, _QUARANTINED = 0, 1, 2


@dataclass(slots=True, eq=False)
class _Quarantine:
    """Blocks freed together, and how many of the micro-batches that touch them are still in flight."""

    blocks: list[int]
    num_steps_left: int


class BlockPool:
    """KV blocks 0..num_blocks-1, the same on every stage of a pipeline.

    A freed block is quarantined until every micro-batch that touched it has returned: a stage that runs such a
    micro-batch late, or again after a reconnect, would write into a block that meanwhile belongs to another sequence.
    A new epoch gets a new pool, since no micro-batch of an older epoch is ever executed.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest in the caches
        self._state = bytearray(num_blocks)
        self._quarantines_by_step: dict[int, list[_Quarantine]] = {}
        self._num_quarantined = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        """Blocks that become free when micro-batches now in flight return."""
        return self._num_quarantined

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks; the caller has checked `num_free`."""
        assert 0 <= num_blocks <= len(self._free), f"{num_blocks} blocks asked, {len(self._free)} free"
        if num_blocks == 0:
            return []
        blocks = self._free[-num_blocks:]
        del self._free[-num_blocks:]
        blocks.reverse()
        for block in blocks:
            self._state[block] = _OWNED
        return blocks

    def free(self, blocks: Iterable[int], *, still_touched_by: Iterable[int] = ()) -> None:
        """Give blocks back. They rest until `step_returned` was called for every step id in `still_touched_by`."""
        blocks = list(blocks)
        steps = set(still_touched_by)
        for block in blocks:
            assert self._state[block] == _OWNED, f"block {block} is freed but not owned"
            self._state[block] = _QUARANTINED if steps else _FREE
        if not steps:
            self._free.extend(reversed(blocks))
        elif blocks:
            self._num_quarantined += len(blocks)
            quarantine = _Quarantine(blocks, len(steps))
            for step_id in steps:
                self._quarantines_by_step.setdefault(step_id, []).append(quarantine)

    def step_returned(self, step_id: int) -> None:
        """A micro-batch came back: blocks that waited for it alone are free."""
        for quarantine in self._quarantines_by_step.pop(step_id, ()):
            quarantine.num_steps_left -= 1
            if quarantine.num_steps_left == 0:
                self._num_quarantined -= len(quarantine.blocks)
                for block in quarantine.blocks:
                    self._state[block] = _FREE
                self._free.extend(reversed(quarantine.blocks))

    def is_quarantined(self, blocks: Iterable[int]) -> bool:
        """Whether all these blocks are in quarantine."""
        return all(self._state[block] == _QUARANTINED for block in blocks)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Every block is free, quarantined or in `owned`, exactly once; raises AssertionError."""
        owned = list(owned)
        quarantines = {id(q): q for waiting in self._quarantines_by_step.values() for q in waiting}
        resting = [block for quarantine in quarantines.values() for block in quarantine.blocks]
        assert len(resting) == self._num_quarantined, f"{len(resting)} blocks rest, {self._num_quarantined} are counted"
        everything = sorted([*self._free, *resting, *owned])
        assert everything == list(range(self.num_blocks)), "a block is lost, or has two owners"
        for blocks, state in ((self._free, _FREE), (resting, _QUARANTINED), (owned, _OWNED)):
            assert all(self._state[block] == state for block in blocks), "the state of a block is wrong"
