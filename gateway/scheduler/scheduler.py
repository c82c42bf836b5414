"""Which tokens of which sequences go into the next micro-batch.

Why it never deadlocks. Sequences have one total order that never changes, `Sequence.rank`.

1. A sequence is admitted whole: it gets the blocks of all its tokens at once, so prefill never waits for memory. Only a
   decode row can need a block, one at a time.
2. A decode that finds no free block preempts a sequence of higher rank that is not in flight. If there is none it waits
   and keeps its place among the ready ones, which are served by waiting time and before prompts: the blocks it waits for
   come with a return (quarantined ones, or those of a sequence that was in flight), and it is the first to take them.
3. With nothing in flight no block is quarantined. Then either something running has work and its blocks; or the lowest
   rank among the ready ones finds a free block, or a victim, or is alone, and alone it fits, as `add` checked; or nothing
   runs, and the first of the waiting finds all blocks free. So `schedule` returns None with nothing in flight only if
   there is no sequence.
4. The running sequence of lowest rank is never a victim, so it ends; then the next one is the lowest. Victims wait at
   their old rank, before all who came later, and only finitely many can come before them: every sequence ends.

Admission leaves one free block for each running sequence, so that those admitted are not preempted again at once.
"""

from __future__ import annotations

from gateway.scheduler.filling import decode_target, prefill_budget
from gateway.scheduler.ledger import Ledger
from gateway.scheduler.micro_batch import MicroBatch, ScheduledRow
from gateway.scheduler.sequence import Sequence


class Scheduler(Ledger):
    """The scheduler of one pipeline: continuous batching, chunked prefill, several micro-batches in flight.

    The engine calls `schedule` until it returns None, sends each micro-batch, and calls `complete` (or `fail`) for each
    when it returns, in the order in which they were sent. Answers of an earlier epoch never reach the scheduler.
    `add`, `complete`, `fail`, `finish`, `reset` and the counters are in `Ledger`.
    """

    def schedule(self) -> MicroBatch | None:
        """The next micro-batch; None when nothing can run now or `max_in_flight` are out.

        With nothing in flight, None means that there are no sequences.
        """
        num_free_slots = self.max_in_flight - len(self._in_flight)
        if num_free_slots <= 0:
            return None
        step_id = self._last_step_id + 1
        rows: list[ScheduledRow] = []
        self._schedule_decodes(step_id, rows, num_free_slots)
        num_decodes = len(rows)
        budget = self._schedule_prefills(step_id, rows)
        self._admit(step_id, rows, budget)
        if not rows:
            return None
        self._last_step_id = step_id
        self._in_flight_prefill.append(sum(row.num_tokens for row in rows) - num_decodes)
        rows.sort(key=lambda row: row.num_tokens != 1)
        micro_batch = MicroBatch(step_id, tuple(rows), tuple(self._released))
        self._released.clear()
        self._in_flight.append(micro_batch)
        return micro_batch

    def _schedule_decodes(self, step_id: int, rows: list[ScheduledRow], num_free_slots: int) -> None:
        """Decode rows, longest wait first. One that finds no block keeps its place for the next micro-batch."""
        target = decode_target(
            num_ready=len(self._ready),
            num_decoding=self._num_decoding,
            max_in_flight=self.max_in_flight,
            num_free_slots=num_free_slots,
        )
        target = min(target, self.max_step_sequences, self.max_step_tokens)
        for sequence in list(self._ready.values()):
            if len(rows) >= target:
                break
            if sequence.sequence_id not in self._ready:
                continue  # preempted by one before it
            if len(sequence.block_table) * self.block_size_tokens < sequence.num_tokens:
                if not self._pool.num_free and not self._preempt_for(sequence):
                    continue
                sequence.block_table.extend(self._pool.allocate(1))
            del self._ready[sequence.sequence_id]
            rows.append(self._row(step_id, sequence, 1))

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Free the blocks of the running sequence that ranks last, if it ranks after this one and is not in flight."""
        if self._pool.num_quarantined:
            return False  # blocks are on their way back: one return is a shorter wait than computing a sequence again
        candidates = (other for other in self._running.values() if not other.in_flight_steps)
        victim = max(candidates, key=lambda other: other.rank)
        if victim is sequence:
            return False
        self._stop_running(victim)
        victim.forget_cache()
        self._waiting.push(victim)
        self.num_preemptions += 1
        return True

    def _schedule_prefills(self, step_id: int, rows: list[ScheduledRow]) -> int:
        """Chunks of running prompts, in service order. Returns the prefill tokens left for new ones."""
        unscheduled = sum(sequence.num_tokens - sequence.num_scheduled_tokens for sequence in self._prefilling.values())
        free_tokens = self._pool.num_free * self.block_size_tokens + unscheduled
        budget = prefill_budget(
            backlog_tokens=self._waiting.num_tokens + unscheduled + sum(self._in_flight_prefill),
            max_in_flight=self.max_in_flight,
            free_kv_fraction=min(1.0, free_tokens / (self._pool.num_blocks * self.block_size_tokens)),
            num_decoding=self._num_decoding,
            room_tokens=self.max_step_tokens - len(rows),
            max_step_tokens=self.max_step_tokens,
            min_prefill_tokens=self.min_prefill_tokens,
        )
        for sequence in sorted(self._prefilling.values(), key=lambda other: other.rank):
            if budget == 0 or len(rows) == self.max_step_sequences:
                break
            budget -= self._prefill_row(step_id, rows, sequence, budget)
        return budget

    def _admit(self, step_id: int, rows: list[ScheduledRow], budget: int) -> None:
        """First chunks of waiting sequences, strictly in service order, as long as tokens, rows and blocks last."""
        max_running = self.max_step_sequences * self.max_in_flight  # more could never be in flight together
        while self._waiting and budget and len(rows) < self.max_step_sequences and len(self._running) < max_running:
            num_blocks = self._num_blocks_for(self._waiting.peek().num_tokens)
            if num_blocks + len(self._running) > self._pool.num_free:
                break
            sequence = self._waiting.pop()
            sequence.block_table.extend(self._pool.allocate(num_blocks))
            self._running[sequence.sequence_id] = sequence
            self._prefilling[sequence.sequence_id] = sequence
            budget -= self._prefill_row(step_id, rows, sequence, budget)

    def _prefill_row(self, step_id: int, rows: list[ScheduledRow], sequence: Sequence, budget: int) -> int:
        """Append the next chunk, at most `budget` tokens. Returns its size."""
        num_tokens = min(budget, sequence.num_tokens - sequence.num_scheduled_tokens)
        rows.append(self._row(step_id, sequence, num_tokens))
        if rows[-1].wants_output:
            del self._prefilling[sequence.sequence_id]
        return num_tokens

    def _row(self, step_id: int, sequence: Sequence, num_tokens: int) -> ScheduledRow:
        start = sequence.num_scheduled_tokens
        end = start + num_tokens
        wants_output = end == sequence.num_tokens
        needs_registration = wants_output and not sequence.registered
        if needs_registration:
            sequence.registered = True
            self._released.pop(sequence.sequence_id, None)  # registering replaces what the stage holds
        sequence.num_scheduled_tokens = end
        sequence.in_flight_steps.append(step_id)
        return ScheduledRow(
            sequence=sequence,
            start=start,
            num_tokens=num_tokens,
            token_ids=sequence.tokens(start, end),
            context_len=end,
            block_table=sequence.block_table[: self._num_blocks_for(end)],
            wants_output=wants_output,
            output_position=len(sequence.output_token_ids),
            needs_registration=needs_registration,
        )
