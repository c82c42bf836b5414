"""A stage that remembers what was written into every KV slot, and the model that it computes."""

from __future__ import annotations

from gateway.scheduler import MicroBatch, ScheduledRow, Sequence


def next_token(sequence_id: int, position: int) -> int:
    """What the simulated model chooses at `position`: depends on nothing else, so recomputing must not show."""
    return (sequence_id * 7919 + position * 104729) % 50021


def contents(sequence: Sequence, end: int) -> list[int]:
    """What the slots of positions [0, end) must hold: a hash of who may share it and of all tokens up to the position."""
    sharing = (sequence.tenant, sequence.cache_salt) if sequence.use_prefix_cache else sequence.sequence_id
    num_prompt, value, values = len(sequence.prompt_token_ids), hash(sharing), []
    for position in range(end):
        token = sequence.prompt_token_ids[position] if position < num_prompt else None
        value = hash((value, next_token(sequence.sequence_id, position) if token is None else token))
        values.append(value)
    return values


class Stage:
    """Executes steps in order; every row must find in the cache exactly what its sequence, or one that began with the same
    tokens, wrote."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        self.registered: set[int] = set()
        self.failed: set[int] = set()  # sequences of a step that was not executed: their cache has a hole

    def execute(self, step: MicroBatch) -> None:
        self.registered -= set(step.released_sequence_ids)
        expected = [contents(row.sequence, row.context_len) for row in step.rows]
        for row, values in zip(step.rows, expected, strict=True):
            for position in range(row.start, row.context_len):
                self.slots[self._slot(row, position)] = values[position]
        for row, values in zip(step.rows, expected, strict=True):  # after all writes: two owners of a slot would show
            sequence_id = row.sequence.sequence_id
            if sequence_id in self.failed:
                continue
            for position, value in enumerate(values):
                assert self.slots[self._slot(row, position)] == value
            if row.needs_registration:
                assert row.wants_output
                self.registered.add(sequence_id)
            if row.wants_output:
                assert sequence_id in self.registered, "the last stage has no history for the penalties"

    def _slot(self, row: ScheduledRow, position: int) -> int:
        return row.block_table[position // self.block_size] * self.block_size + position % self.block_size
