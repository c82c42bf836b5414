"""Which tokens of which sequences go into the next micro-batch.

Why it never deadlocks. Running sequences have one total order that never changes, `Sequence.rank`.

1. A sequence is admitted whole: it gets the blocks of all its tokens at once, so prefill never waits for memory. Only a
   decode row can need a block, one at a time.
2. A decode that finds no free block preempts sequences of higher rank that are not in flight, the highest first, until one
   is free (the blocks of a victim may be shared). If there is none it waits and keeps its place among the ready ones, which
   are served by waiting time and before prompts: the blocks it waits for come with a return (quarantined ones, or those of
   a sequence that was in flight), and it is the first to take them. A sequence whose request holds more than its share of
   the cache leaves one free block for each of the others, and preempts only when nothing else could run.
3. With nothing in flight no block is quarantined. Then either something running has work and its blocks; or the lowest
   rank among the ready ones finds a free block, or a victim, or is alone, and alone it fits, as `add` checked; or nothing
   runs, and the first of the waiting finds all blocks free. So `schedule` returns None with nothing in flight only if
   there is no sequence.
4. The running sequence of lowest rank is never a victim, so it ends; then the next one is the lowest. Victims wait before
   all of their priority that never ran, and `WaitingQueue` starves nobody: every sequence ends.

Admission leaves one free block for each running sequence, so that those admitted are not preempted again at once.

Sequences of negative priority (batches) are the background. While others run, these are dealt out first, as if there were no
background; it gets what makes the micro-batch little longer, and at least one token, so that it ends too.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.scheduler.blocks import Blocks, by_rank
from gateway.scheduler.filling import (
    BACKGROUND_SLOWDOWN,
    COHORT_SLOWDOWN,
    DECODE_SLOWDOWN,
    decode_target,
    num_chunks,
    num_groups,
    prefill_budget,
    ramp,
)
from gateway.scheduler.micro_batch import MicroBatch, ScheduledRow
from gateway.scheduler.sequence import Sequence

PROBE_PRIORITY = 1 << 40
"""Sequences of at least this priority go before everything, also before those that must run alone: they prove a pipeline."""


class Scheduler(Blocks):
    """The scheduler of one pipeline: continuous batching, chunked prefill, several micro-batches in flight.

    The engine calls `schedule` until it returns None, sends each micro-batch, and calls `complete` (or `fail`) for each
    when it returns, in the order in which they were sent. Answers of an earlier epoch never reach the scheduler.
    `add`, `complete`, `fail`, `finish`, `reset` and the counters are in `Ledger`.
    """

    def schedule(self) -> MicroBatch | None:
        """The next micro-batch; None when nothing can run now or as many as are useful are out.

        With nothing in flight, None means that there are no sequences, or some are held (`hold`).
        """
        num_free_slots = self._most_in_flight() - len(self._in_flight)
        if num_free_slots <= 0:
            return None
        step_id = self._last_step_id + 1
        rows: list[ScheduledRow] = []
        if self._alone:
            self._schedule_alone(step_id, rows)
        else:
            if 0 < self.num_background < len(self._sequences):
                self._fill(step_id, rows, num_free_slots, background=False)
                self._fill_background(step_id, rows, num_free_slots)
            else:
                self._fill(step_id, rows, num_free_slots)
            if not rows and not self._in_flight:
                self._schedule_decodes(step_id, rows, num_free_slots, last_resort=True)
        if not rows:
            return None
        self._last_step_id = step_id
        self._in_flight_prefill.append(sum(row.num_tokens for row in rows if row.is_prefill))
        rows.sort(key=lambda row: row.num_tokens != 1)
        micro_batch = MicroBatch(step_id, tuple(rows), tuple(self._released))
        self._released.clear()
        self._in_flight.append(micro_batch)
        return micro_batch

    def _most_in_flight(self) -> int:
        """While sequences decode, no more than their groups: one more micro-batch would stand in their way."""
        if self._num_decoding() == 0:
            return self.max_in_flight
        groups = num_groups(num_stages=self.num_stages, fixed_s=self.costs.fixed_s, overhead_s=self.costs.overhead_s)
        return min(groups, self.max_in_flight)

    def _fill(
        self, step_id: int, rows: list[ScheduledRow], num_free_slots: int, *, background: bool | None = None
    ) -> None:
        """Decodes, then prompts: of all sequences, or of those in the background, or of the others."""
        self._schedule_decodes(step_id, rows, num_free_slots, background=background)
        self._schedule_prefills(step_id, rows, self._prefill_budget(rows, len(rows), background), background)

    def _fill_background(self, step_id: int, rows: list[ScheduledRow], num_free_slots: int) -> None:
        """The background, beside the rows of the foreground."""
        if all(one.is_background for one in self._running.values()):  # the others wait for its blocks
            self._fill(step_id, rows, num_free_slots, background=True)
            return
        num_foreground = len(rows)
        num_decodes = sum(not row.is_prefill for row in rows)
        # A step with a prompt of the foreground is long enough for its streams.
        slowdown = 1.0 if num_decodes < num_foreground else BACKGROUND_SLOWDOWN
        most = self.costs.most_decodes(beside=num_decodes, slowdown=slowdown)
        self._schedule_decodes(
            step_id, rows, num_free_slots, background=True, most=None if most is None else max(1, most)
        )
        budget = self._prefill_budget(rows, num_decodes, background=True)
        num_taken = len(rows) - num_foreground
        tokens = self.costs.most_prefill_tokens(
            num_decodes=num_decodes, slowdown=slowdown, context_tokens=0, more_decodes=num_taken
        )
        if tokens is not None:
            budget = min(budget, max(tokens, 0 if num_taken else 1))
        self._schedule_prefills(step_id, rows, budget, background=True)

    def _of(self, sequences: Iterable[Sequence], background: bool | None) -> list[Sequence]:
        if background is None:
            return list(sequences)
        return [one for one in sequences if one.is_background == background]

    def _num_decoding(self, background: bool | None = None) -> int:
        """Running sequences past prefill, those whose last chunk is in flight included."""
        running, prefilling = self._running.values(), self._prefilling.values()
        return len(self._of(running, background)) - len(self._of(prefilling, background))

    def _schedule_decodes(
        self,
        step_id: int,
        rows: list[ScheduledRow],
        num_free_slots: int,
        *,
        background: bool | None = None,
        most: int | None = None,
        last_resort: bool = False,
    ) -> None:
        """Decode rows, longest wait first, `most` of them. One that finds no block keeps its place for the next micro-batch."""
        ready = self._of(self._ready.values(), background)
        if self._held:
            ready = [one for one in ready if one.sequence_id not in self._held]
        target = decode_target(
            num_ready=len(ready),
            num_decoding=self._num_decoding(background),
            num_groups=num_free_slots + len(self._in_flight),
            num_free_slots=num_free_slots,
        )
        if most is not None:
            target = min(target, most)
        target = min(len(rows) + min(target, self._room(rows)), self.limits.max_step_sequences)
        for sequence in ready:
            if len(rows) >= target:
                break
            # It may have been preempted by one before it.
            if sequence.sequence_id in self._ready and self._has_slot(sequence, last_resort=last_resort):
                del self._ready[sequence.sequence_id]
                rows.append(self._row(step_id, sequence, 1, is_prefill=False))

    def _schedule_prefills(
        self, step_id: int, rows: list[ScheduledRow], budget: int, background: bool | None = None
    ) -> None:
        """Chunks of running prompts, then first ones of waiting prompts, `budget` tokens, in service order.

        Of sequences with branches no more than an even share over the stages: they come again when they return, as decodes do, and
        all together would be in one stage at a time.
        """
        if not budget:  # most steps: nothing but decodes
            return
        branches_left = -(-sum(one.is_branching for one in self._running.values()) // self.num_stages)
        for sequence in sorted(self._of(self._prefilling.values(), background), key=by_rank):
            if budget == 0 or len(rows) == self.limits.max_step_sequences:
                break
            if sequence.is_branching and not branches_left:
                continue
            if not self._waits_for_prefix(sequence):
                branches_left -= sequence.is_branching
                budget -= self._prefill_row(step_id, rows, sequence, budget)
        self._admit(step_id, rows, budget, background)

    def _room(self, rows: list[ScheduledRow]) -> int:
        """Tokens that may be added to these rows."""
        return self.limits.max_step_tokens - sum(row.num_tokens for row in rows)

    def _prefill_budget(self, rows: list[ScheduledRow], num_decodes: int, background: bool | None) -> int:
        """Prefill tokens to add to these rows, of which so many are decodes that they may hold up."""
        prompts = self._of(self._prefilling.values(), background)
        unscheduled = sum(one.num_unscheduled_tokens for one in prompts)
        backlog = self._waiting.num_tokens_of(background) + unscheduled
        if not backlog or not self._room(rows):
            return 0
        free_tokens = self._pool.num_free * self.block_size_tokens + unscheduled
        begun = sum(prompt.num_scheduled_tokens for prompt in prompts)
        first = min(prompts, key=by_rank) if prompts else self._waiting.first()
        context = 0 if first is None else first.num_scheduled_tokens
        token_s = self.costs.prefill_token_s(context)
        chunks = num_chunks(
            backlog_tokens=backlog + begun, num_stages=self.num_stages, fixed_s=self.costs.fixed_s, token_s=token_s
        )
        slowdown = DECODE_SLOWDOWN if first is not None and self._came_to_decodes(first) else COHORT_SLOWDOWN
        most = self.costs.most_prefill_tokens(num_decodes=num_decodes, slowdown=slowdown, context_tokens=context)
        if most is not None:
            most = ramp(most, self._in_flight_prefill)
        return prefill_budget(
            backlog_tokens=backlog + sum(self._in_flight_prefill) if chunks is None else backlog + begun,
            num_chunks=self.max_in_flight if chunks is None else chunks,
            free_kv_fraction=min(1.0, free_tokens / (self._pool.num_blocks * self.block_size_tokens)),
            num_decoding=self._num_decoding(background),
            most_beside_decodes=most,
            room_tokens=self._room(rows),
            max_step_tokens=self.limits.max_step_tokens,
            min_prefill_tokens=self.limits.min_prefill_tokens,
        )

    def _came_to_decodes(self, prompt: Sequence) -> bool:
        """Whether something that it must not hold up decoded already when it arrived."""
        return any(
            one.decodes_since is not None and one.decodes_since <= prompt.arrival
            for one in self._running.values()
            if prompt.is_background or not one.is_background
        )

    def _admit(self, step_id: int, rows: list[ScheduledRow], budget: int, background: bool | None) -> None:
        """First chunks of waiting sequences, in service order, as long as tokens, rows and blocks last.

        One whose request has its share of the cache is passed over; one that finds no blocks is waited for, and so is one of the
        other kind whose turn it is.
        """
        limits = self.limits
        max_running = limits.max_step_sequences * self.max_in_flight  # more could never be in flight together
        while budget and len(rows) < limits.max_step_sequences and len(self._running) < max_running:
            sequence = self._waiting.first(self._may_be_admitted)
            if sequence is None or background not in (None, sequence.is_background) or not self._allocate(sequence):
                break
            budget -= self._prefill_row(step_id, rows, sequence, budget)

    def _prefill_row(self, step_id: int, rows: list[ScheduledRow], sequence: Sequence, budget: int) -> int:
        """Append the next chunk, at most `budget` tokens. Returns its size."""
        if sequence.num_scheduled_tokens:
            self._adopt(sequence)
        num_tokens = min(budget, sequence.num_unscheduled_tokens)
        rows.append(self._row(step_id, sequence, num_tokens, is_prefill=True))
        if rows[-1].wants_output:
            del self._prefilling[sequence.sequence_id]
        return num_tokens

    def _schedule_alone(self, step_id: int, rows: list[ScheduledRow]) -> None:
        """The next row of a sequence that must run alone (probes before it), once nothing else is in flight. The others
        keep their blocks unless it needs them."""
        probes = [sequence for sequence in self._sequences.values() if sequence.priority >= PROBE_PRIORITY]
        sequence = min([*probes, *self._alone.values()], key=by_rank)
        if any(row.sequence is not sequence for step in self._in_flight for row in step.rows):
            return
        others = sorted((other for other in self._running.values() if other is not sequence), key=by_rank)
        if sequence.sequence_id not in self._running:
            while not self._allocate(sequence):
                self._preempt(others.pop())
        if sequence.sequence_id in self._prefilling:
            self._prefill_row(step_id, rows, sequence, self.limits.max_step_tokens)
        elif sequence.sequence_id in self._ready and sequence.sequence_id not in self._held:
            while others and not self._pool.num_free:
                self._preempt(others.pop())
            if self._has_slot(sequence, last_resort=True):
                del self._ready[sequence.sequence_id]
                rows.append(self._row(step_id, sequence, 1, is_prefill=False))

    def _row(self, step_id: int, sequence: Sequence, num_tokens: int, *, is_prefill: bool) -> ScheduledRow:
        start = sequence.num_scheduled_tokens
        end = start + num_tokens
        wants_output = end == sequence.num_tokens
        needs_registration = wants_output and not sequence.registered
        if needs_registration:
            sequence.registered = True
            self._released.pop(sequence.sequence_id, None)  # registering replaces what the stage holds
        sequence.num_scheduled_tokens = end
        sequence.in_flight_steps.append(step_id)
        scored_from, target_ids = sequence.targets(start, end)
        row = ScheduledRow(
            sequence=sequence,
            start=start,
            num_tokens=num_tokens,
            token_ids=sequence.tokens(start, end),
            context_len=end,
            block_table=sequence.block_table[: self._num_blocks_for(end)],
            wants_output=wants_output,
            output_position=len(sequence.output_token_ids),
            needs_registration=needs_registration,
            is_prefill=is_prefill,
            scored_from=scored_from,
            target_ids=target_ids,
            alternative_ids=sequence.alternatives(start, end),
        )
        if is_prefill:
            self._being_filled.update(self._filled_keys(row))
        return row
