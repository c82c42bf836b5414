"""A sequence: one choice of one request, as the scheduler sees it."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

PRIORITY_HEAD_START = 1024
"""Sequences that one level of priority may overtake. See `Sequence.rank`."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Prompt, generated tokens, and where its keys and values are.

    The caller sets the first six fields and only reads the others. `output_token_ids` begins with the tokens of a
    resumed generation; the scheduler appends what `Scheduler.complete` brings. `max_total_tokens` bounds prompt and
    output together, in tokens. A higher `priority` goes first. A `Sequence` belongs to one scheduler for life: to go on
    elsewhere, make a new one whose `output_token_ids` holds what was generated.
    """

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: list[int] = field(default_factory=list)
    choice_index: int = 0
    max_total_tokens: int
    priority: int = 0

    arrival: int = -1
    """Number of the `Scheduler.add` call, from 0; -1 before it."""
    finished: bool = False
    """Finished or cancelled: no more rows are made, rows in flight are ignored when they return."""
    registered: bool = False
    """Whether a row of this epoch already told the last stage the history that penalties need."""
    num_computed_tokens: int = 0
    """Tokens, from position 0, whose keys and values are written and whose micro-batch has returned."""
    num_scheduled_tokens: int = 0
    """The same, with those of the micro-batches in flight."""
    in_flight_steps: deque[int] = field(default_factory=deque)
    """Micro-batches in flight that hold a row of this sequence, oldest first."""
    block_table: array[int] = field(default_factory=lambda: array("i"))
    """int32 KV block ids by position; empty unless the sequence is running."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Place in the service order, lower first: priority, then arrival. No two sequences have the same.

        One level of priority is worth `PRIORITY_HEAD_START` places. The order never changes while a sequence lives, and
        only finitely many sequences can ever stand before it, so a flood of urgent requests delays the others but
        cannot starve them.
        """
        return self.arrival - self.priority * PRIORITY_HEAD_START, self.arrival

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids at positions [start, end) of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return tuple(self.output_token_ids[start - num_prompt : end - num_prompt])
        return self.prompt_token_ids[start:end] + tuple(self.output_token_ids[: max(0, end - num_prompt)])

    def forget_cache(self) -> None:
        """Back to the state before the first row: every token is to be computed (again)."""
        self.registered = False
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.in_flight_steps.clear()
        self.block_table = array("i")
