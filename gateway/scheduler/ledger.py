"""What the scheduler knows, and how it changes when something happens. The choices are in scheduler.py."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping

from gateway.scheduler.block_pool import BlockPool
from gateway.scheduler.micro_batch import MicroBatch
from gateway.scheduler.sequence import Sequence
from gateway.scheduler.waiting_queue import WaitingQueue
from stageline.errors import InvalidArgumentError, ResourceExhaustedError


class Ledger:
    """Every live sequence, its blocks, and the micro-batches in flight: the state of `Scheduler` and its transitions.

    A live sequence is waiting (no blocks) or running. A running one is prefilling (tokens not scheduled yet), ready (one
    token to decode, not in flight), or all it has is in flight.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size_tokens: int,
        max_step_tokens: int = 2048,
        max_step_sequences: int = 256,
        max_in_flight: int = 1,
        max_waiting_sequences: int = 1024,
        min_prefill_tokens: int = 64,
    ) -> None:
        """Limits are per pipeline (`num_blocks`, `max_in_flight`, `max_waiting_sequences`) or per micro-batch.

        `max_in_flight` must not exceed any stage's queue depth; it may be set at any time, also while micro-batches are
        in flight. `min_prefill_tokens` is the least prefill a micro-batch carries while prompts wait and
        `max_step_tokens` leaves room.
        """
        limits = (block_size_tokens, max_step_tokens, max_step_sequences, max_in_flight, max_waiting_sequences)
        assert min(*limits, min_prefill_tokens) > 0
        self.block_size_tokens = block_size_tokens
        self.max_step_tokens = max_step_tokens
        self.max_step_sequences = max_step_sequences
        self.max_in_flight = max_in_flight
        self.max_waiting_sequences = max_waiting_sequences
        self.min_prefill_tokens = min_prefill_tokens
        self.num_preemptions = 0
        """Since the scheduler was made. A growing number means too few KV blocks."""

        self._pool = BlockPool(num_blocks)
        self._sequences: dict[int, Sequence] = {}  # every live sequence, waiting or running
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}  # those with blocks
        self._prefilling: dict[int, Sequence] = {}  # of the running: not all tokens scheduled yet
        self._ready: dict[int, Sequence] = {}  # of the running: one token to decode, not in flight; longest wait first
        self._in_flight: deque[MicroBatch] = deque()
        self._in_flight_prefill: deque[int] = deque()  # prefill tokens of each of them
        self._released: dict[int, None] = {}  # an ordered set: ids whose penalty counts the last stage still holds
        self._num_added = 0
        self._last_step_id = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; `sequence.num_tokens` is under `max_total_tokens` and at least 1.

        Raises ResourceExhaustedError QUEUE_FULL when `max_waiting_sequences` wait already, InvalidArgumentError
        KV_CACHE_TOO_SMALL when the sequence could not be held even if it had all KV blocks alone.
        """
        assert sequence.arrival < 0, "a sequence belongs to one scheduler for life"
        assert sequence.sequence_id not in self._sequences
        assert 1 <= sequence.num_tokens < sequence.max_total_tokens
        if not self._fits(sequence):
            capacity = self._pool.num_blocks * self.block_size_tokens
            raise InvalidArgumentError(
                "KV_CACHE_TOO_SMALL",
                f"prompt and max_tokens together are {sequence.max_total_tokens} tokens, but the pipeline has KV cache for "
                f"{capacity}; shorten the prompt, lower max_tokens, or give the stages more KV memory",
                requested_tokens=sequence.max_total_tokens,
                capacity_tokens=capacity,
            )
        if len(self._waiting) >= self.max_waiting_sequences:
            raise ResourceExhaustedError(
                "QUEUE_FULL",
                f"{len(self._waiting)} sequences are waiting already, the most this pipeline queues; retry later",
                waiting=len(self._waiting),
                limit=self.max_waiting_sequences,
            )
        sequence.arrival = self._num_added
        self._num_added += 1
        self._sequences[sequence.sequence_id] = sequence
        self._waiting.push(sequence)

    def complete(self, step_id: int, tokens: Mapping[int, int]) -> None:
        """The oldest micro-batch in flight returned; `tokens` maps sequence id to chosen token id.

        There is one for every row that wants an output and whose sequence is not `finished`: `finish` first the sequences
        whose answer is unusable. Others are ignored. Each token is appended to its `output_token_ids`; a sequence that
        reaches `max_total_tokens` is finished here (a later `finish` of it does nothing).
        """
        for row in self._take_returned(step_id).rows:
            sequence = row.sequence
            sequence.in_flight_steps.popleft()
            if sequence.finished:
                continue
            sequence.num_computed_tokens = row.context_len
            if row.wants_output:
                sequence.output_token_ids.append(tokens[sequence.sequence_id])
                if sequence.num_tokens == sequence.max_total_tokens:
                    self.finish(sequence.sequence_id)
                else:
                    self._ready[sequence.sequence_id] = sequence

    def fail(self, step_id: int) -> tuple[Sequence, ...]:
        """The oldest micro-batch in flight was not executed (StepError): its live sequences are finished and returned."""
        micro_batch = self._take_returned(step_id)
        live = tuple(row.sequence for row in micro_batch.rows if not row.sequence.finished)
        for row in micro_batch.rows:
            row.sequence.in_flight_steps.popleft()
        for sequence in live:
            self.finish(sequence.sequence_id)
        for sequence_id in micro_batch.released_sequence_ids:  # the last stage may not have seen this step
            released = self._sequences.get(sequence_id)
            if released is None or not released.registered:
                self._released[sequence_id] = None
        return live

    def _take_returned(self, step_id: int) -> MicroBatch:
        micro_batch = self._in_flight.popleft()
        assert micro_batch.step_id == step_id, f"step {step_id} returned before step {micro_batch.step_id}"
        self._in_flight_prefill.popleft()
        self._pool.step_returned(step_id)
        return micro_batch

    def finish(self, sequence_id: int) -> bool:
        """End a sequence (stop token, cancelled, expired) at any time; False if there is none of that id (any more).

        Its blocks are free as soon as no micro-batch in flight touches them.
        """
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return False
        sequence.finished = True
        if sequence_id in self._running:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        return True

    cancel = finish

    def _stop_running(self, sequence: Sequence) -> None:
        """Take its blocks; those that micro-batches in flight touch rest in quarantine."""
        del self._running[sequence.sequence_id]
        self._prefilling.pop(sequence.sequence_id, None)
        self._ready.pop(sequence.sequence_id, None)
        self._pool.free(sequence.block_table, still_touched_by=sequence.in_flight_steps)
        sequence.block_table = array("i")
        if sequence.registered:
            self._released[sequence.sequence_id] = None

    def reset(self, num_blocks: int) -> tuple[Sequence, ...]:
        """A new epoch with `num_blocks` empty blocks: nothing is in flight, step ids restart from 1.

        All sequences wait to be computed again, in their old order. Those that cannot fit `num_blocks` are finished and
        returned.
        """
        self._pool = BlockPool(num_blocks)
        self._in_flight.clear()
        self._in_flight_prefill.clear()
        self._last_step_id = 0
        self._prefilling.clear()
        self._ready.clear()
        for sequence in self._running.values():
            sequence.forget_cache()
            self._waiting.push(sequence)
        self._running.clear()
        self._released.clear()  # stages forget all sequences of an older epoch
        too_long = tuple(sequence for sequence in self._sequences.values() if not self._fits(sequence))
        for sequence in too_long:
            self.finish(sequence.sequence_id)
        return too_long

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def _fits(self, sequence: Sequence) -> bool:
        # The last token is chosen but never computed, so it needs no slot.
        return self._num_blocks_for(sequence.max_total_tokens - 1) <= self._pool.num_blocks

    @property
    def _num_decoding(self) -> int:
        """Running sequences past prefill, those whose last chunk is in flight included."""
        return len(self._running) - len(self._prefilling)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: new, preempted, or sent back by a reset."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be given to a sequence now."""
        return self._pool.num_free

    @property
    def num_in_flight(self) -> int:
        """Micro-batches sent and not returned."""
        return len(self._in_flight)

    def check_integrity(self) -> None:
        """Every invariant, or AssertionError. Costs time in proportion to all blocks and tokens: for tests."""
        running = self._running
        self._pool.check_integrity(block for sequence in running.values() for block in sequence.block_table)
        assert {*running, *(sequence.sequence_id for sequence in self._waiting)} == set(self._sequences)
        assert len(running) + len(self._waiting) == len(self._sequences)
        assert self._waiting.num_tokens == sum(sequence.num_tokens for sequence in self._waiting)
        assert [s.rank for s in self._waiting] == sorted(s.rank for s in self._waiting)
        for sequence in self._waiting:
            assert not sequence.block_table
            assert not sequence.in_flight_steps
            assert not sequence.registered
            assert sequence.num_computed_tokens == sequence.num_scheduled_tokens == 0
        assert not self._prefilling.keys() & self._ready.keys()
        for sequence_id, sequence in running.items():
            steps = [step.step_id for step in self._in_flight if any(row.sequence is sequence for row in step.rows)]
            assert list(sequence.in_flight_steps) == steps
            num_unscheduled = sequence.num_tokens - sequence.num_scheduled_tokens
            assert (sequence_id in self._ready) == (num_unscheduled == 1 and sequence_id not in self._prefilling)
            assert (sequence_id in self._prefilling or sequence_id in self._ready) == (num_unscheduled > 0)
            assert sequence_id not in self._ready or not steps, "a ready sequence is in flight"
            assert 0 <= sequence.num_computed_tokens <= sequence.num_scheduled_tokens <= sequence.num_tokens
            assert len(sequence.block_table) >= self._num_blocks_for(sequence.num_scheduled_tokens)
            assert sequence.num_tokens < sequence.max_total_tokens
        for step in self._in_flight:
            for row in step.rows:
                if row.sequence.finished:
                    assert self._pool.is_quarantined(row.block_table), "a block in flight is not in quarantine"
                else:
                    assert row.block_table == row.sequence.block_table[: len(row.block_table)]
        live_registered = {s.sequence_id for s in self._sequences.values() if s.registered}
        assert not live_registered & self._released.keys(), "the history of a live sequence would be forgotten"
