"""What one step computes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from gateway.scheduler.sequence import Sequence


@dataclass(slots=True, eq=False)
class ScheduledRow:
    """The part of one sequence in a micro-batch: positions [start, start + num_tokens). Read only.

    `token_ids` and `block_table` are copies and stay as they are while the sequence goes on. `block_table` is int32,
    [ceil(context_len / block_size_tokens)]; `context_len` is start + num_tokens. `wants_output`: the last token of the
    row is the last the sequence has, so the next one is to be chosen. `output_position` is the number of tokens
    generated before that one. `needs_registration`: first output row since the sequence was added, preempted or the
    epoch began, so the last stage must be told (again) the history that penalties need. That history is
    `sequence.prompt_token_ids` and the first `output_position` of `sequence.output_token_ids`.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    context_len: int
    block_table: array[int]
    wants_output: bool
    output_position: int
    needs_registration: bool
    is_prefill: bool
    """A chunk of tokens that were there when the sequence began (again), not the token chosen last."""
    scored_from: int = 0
    """Tokens of the row before the first one whose next token is scored."""
    target_ids: tuple[int, ...] = ()
    """Those next tokens; the last of them may belong to a later row, or to none."""
    alternative_ids: tuple[int, ...] = ()
    """Other tokens that are scored in place of the first target."""


@dataclass(slots=True, eq=False)
class MicroBatch:
    """The rows of one step; rows of exactly one token come first. Read only.

    `step_id` counts from 1 in every epoch. `released_sequence_ids` ended or were preempted since the micro-batch before:
    the last stage forgets their penalty counts. None of them has an output row here.
    """

    step_id: int
    rows: tuple[ScheduledRow, ...]
    released_sequence_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.num_tokens for row in self.rows)
