"""Debug mode: what every slot should hold, checked whenever a row reads it. Catches block tables that lie.

A slot is tagged with the position and the token it was written for, the sequence that wrote it, and a hash of the whole
prefix. The tokens of a row's context are not in the step, but hashes chain: the tag at position p must be the hash of
the tag at p - 1 and of the token at p, and a sequence goes on from the hash it had. So a block of another sequence is told apart by its content, and a block that
sequences share because their prefixes are equal is not. No torch here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stageline.errors import InternalError
from stages.batch import StepBatch

_MULTIPLIER, _INCREMENT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


class KVTags:
    """Tags of one stage's slots. Position -1: never written since the cache was made or wired again."""

    def __init__(self, num_blocks: int, block_size_tokens: int) -> None:
        num_slots = num_blocks * block_size_tokens
        self._block_size_tokens = block_size_tokens
        self._positions = np.full(num_slots, -1, dtype=np.int64)
        self._tokens = np.zeros(num_slots, dtype=np.int32)
        self._sequences = np.zeros(num_slots, dtype=np.uint64)
        self._hashes = np.zeros(num_slots, dtype=np.uint64)
        self._last: dict[int, tuple[int, int]] = {}  # sequence → position and hash written last

    def write(self, batch: StepBatch) -> None:
        """Tag the slots that the step writes. Raises InternalError where a sequence goes on from another's prefix."""
        self._positions[batch.slots] = batch.positions
        self._tokens[batch.slots] = batch.token_ids
        for row, sequence_id in enumerate(batch.sequence_ids):
            begin, end = batch.query_starts[row : row + 2]
            slots = batch.slots[begin:end]
            self._sequences[slots] = sequence_id
            first = int(batch.positions[begin])
            value: np.uint64 | NDArray[np.uint64] = np.uint64(0)
            if first:
                slot = int(self._slots(batch, row, first)[-1])
                value = self._hashes[slot]
                position, known = self._last.get(sequence_id, (-1, 0))  # none: its beginning came from the prefix cache
                if position == first - 1 and known != int(value):
                    raise self._mismatch(sequence_id, position, slot)
            for slot, token in zip(slots, batch.token_ids[begin:end], strict=True):
                value = _chain(value, np.asarray(token))
                self._hashes[slot] = value
            self._last[sequence_id] = (int(batch.positions[end - 1]), int(value))

    def check(self, batch: StepBatch) -> None:
        """Raises InternalError (reason KV_TAG_MISMATCH) where a row would read what does not belong to it."""
        for row, sequence_id in enumerate(batch.sequence_ids):
            length = int(batch.context_lens[row])
            slots = self._slots(batch, row, length)
            before = np.concatenate((np.zeros(1, np.uint64), self._hashes[slots[:-1]]))
            wrong = (self._positions[slots] != np.arange(length)) | (
                self._hashes[slots] != _chain(before, self._tokens[slots])
            )
            if wrong.any():
                position = int(wrong.argmax())
                raise self._mismatch(sequence_id, position, int(slots[position]))

    def _mismatch(self, sequence_id: int, position: int, slot: int) -> InternalError:
        return InternalError(
            "KV_TAG_MISMATCH",
            f"sequence {sequence_id} would read position {position} from slot {slot}, which holds position "
            f"{self._positions[slot]} (token {self._tokens[slot]}) of sequence {self._sequences[slot]}",
            sequence_id=sequence_id, position=position, slot=slot,
        )  # fmt: skip

    def _slots(self, batch: StepBatch, row: int, length: int) -> NDArray[np.int64]:
        """Slots of the row's positions [0, length)."""
        positions = np.arange(length)
        blocks = batch.block_tables[row, positions // self._block_size_tokens].astype(np.int64)
        slots: NDArray[np.int64] = blocks * self._block_size_tokens + positions % self._block_size_tokens
        return slots


def _chain(before: NDArray[np.uint64] | np.uint64, token: NDArray[np.int32]) -> NDArray[np.uint64]:
    """uint64, wrapping: an odd multiplier makes it a bijection of `before`, and of the token."""
    with np.errstate(over="ignore"):
        mixed = (np.asarray(before) ^ (token.astype(np.uint64) + _INCREMENT)) * _MULTIPLIER
        return np.asarray(mixed ^ (mixed >> np.uint64(29)))
