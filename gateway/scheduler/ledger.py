"""What the scheduler knows, and how it changes when something happens. The choices are in blocks.py and scheduler.py."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Collection, Mapping
from heapq import heappop, heappush

from gateway.scheduler.block_pool import BlockPool
from gateway.scheduler.drain_rate import DrainRate
from gateway.scheduler.limits import SchedulerLimits
from gateway.scheduler.micro_batch import MicroBatch, ScheduledRow
from gateway.scheduler.sequence import Sequence
from gateway.scheduler.step_cost import StepCosts, StepTiming
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
        max_in_flight: int = 1,
        num_stages: int | None = None,
        limits: SchedulerLimits | None = None,
    ) -> None:
        """`num_blocks` of a pipeline of `num_stages` (default: `max_in_flight`).

        `max_in_flight` micro-batches must not exceed any stage's queue depth; both it and `num_stages` may be set at any
        time, also while micro-batches are in flight.
        """
        assert min(block_size_tokens, max_in_flight) > 0
        self.block_size_tokens = block_size_tokens
        self.max_in_flight = max_in_flight
        self.num_stages = max_in_flight if num_stages is None else num_stages
        self.limits = limits or SchedulerLimits()
        self.num_preemptions = 0
        """Since the scheduler was made. A growing number means too few KV blocks."""
        self.num_background = 0
        """Live sequences of negative priority."""
        self.costs = StepCosts()

        self._pool = BlockPool(num_blocks)
        self._sequences: dict[int, Sequence] = {}  # every live sequence, waiting or running
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}  # those with blocks
        self._by_request: dict[int, dict[int, Sequence]] = {}  # live ones of requests that have a key
        self._prefilling: dict[int, Sequence] = {}  # of the running: not all tokens scheduled yet
        self._ready: dict[int, Sequence] = {}  # of the running: one token to decode, not in flight; longest wait first
        self._held: set[int] = set()  # of the ready ones: those that must not be scheduled yet
        self._alone: dict[int, Sequence] = {}  # live ones that must run alone
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; also of sequences that ended
        self._in_flight: deque[MicroBatch] = deque()
        self._in_flight_prefill: deque[int] = deque()  # prefill tokens of each of them
        self._being_filled: Counter[bytes] = Counter()  # keys of the blocks that prefill rows in flight complete
        self._released: dict[int, None] = {}  # an ordered set: ids whose penalty counts the last stage still holds
        self._drain_rate = DrainRate()
        self._now_s = 0.0
        self._num_added = 0
        self._last_step_id = 0

    def add(self, sequence: Sequence, *, bounded: bool = True) -> None:
        """Queue a new sequence; `sequence.num_tokens` is under `max_total_tokens` and at least 1.

        Raises ResourceExhaustedError QUEUE_FULL when the queue is full (unless not `bounded`: a sequence that was accepted
        before, elsewhere), InvalidArgumentError KV_CACHE_TOO_SMALL when the sequence could not be held even if it had all
        KV blocks alone.
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
        if bounded:
            self.check_room(sequence.num_tokens)
        sequence.arrival = self._num_added
        self._num_added += 1
        self._sequences[sequence.sequence_id] = sequence
        self.num_background += sequence.is_background
        if sequence.resumed:
            self._queue_again(sequence)
        else:
            self._waiting.push(sequence)
        if sequence.request_key is not None:
            self._by_request.setdefault(sequence.request_key, {})[sequence.sequence_id] = sequence
        if sequence.run_alone:
            self._alone[sequence.sequence_id] = sequence
        if sequence.deadline_s is not None:
            heappush(self._deadlines, (sequence.deadline_s, sequence.arrival, sequence))

    def check_room(self, num_tokens: int) -> None:
        """Raises ResourceExhaustedError QUEUE_FULL where a sequence of so many tokens would not be queued."""
        limits, waiting = self.limits, self._waiting
        for what, used, asked, limit in (
            ("sequences", len(waiting), 1, limits.max_waiting_sequences),
            # One that waits alone is let in however long it is: `_fits` bounds it.
            ("tokens", waiting.num_tokens, num_tokens if len(waiting) else 0, limits.max_waiting_tokens),
        ):
            if used + asked > limit:
                retry_after_s = self._drain_rate.retry_after_s(waiting.num_tokens, self._now_s)
                raise ResourceExhaustedError(
                    "QUEUE_FULL",
                    f"{used} {what} are waiting already and this pipeline queues at most {limit}; "
                    f"retry in {retry_after_s:g} s",
                    retry_after_s=retry_after_s,
                    waiting=used,
                    limit=limit,
                    unit=what,
                )

    def expire(self, now_s: float) -> tuple[Sequence, ...]:
        """The time is `now_s`: finish and return the sequences whose deadline has come, so that no more is computed."""
        self._now_s = now_s
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heappop(self._deadlines)[2]
            if not sequence.finished:
                self.finish(sequence.sequence_id)
                expired.append(sequence)
        return tuple(expired)

    def complete(self, step_id: int, tokens: Mapping[int, int], *, timing: StepTiming | None = None) -> None:
        """The oldest micro-batch in flight returned; `tokens` maps sequence id to chosen token id.

        There is one for every row that wants an output and whose sequence is not `finished` (where the token is forced, that
        one): `finish` first the sequences whose answer is unusable. Others are ignored. Each token is appended to its `output_token_ids`; a sequence that
        reaches `max_total_tokens` is finished here (a later `finish` of it does nothing).
        """
        micro_batch = self._take_returned(step_id)
        if timing is not None:
            self._learn(micro_batch, timing)
        for row in micro_batch.rows:
            sequence = row.sequence
            sequence.in_flight_steps.popleft()
            if sequence.finished:
                continue
            sequence.num_computed_tokens = max(sequence.num_computed_tokens, row.context_len)
            self._publish(row)
            if row.target_ids:
                sequence.score_from = row.start + row.scored_from + len(row.target_ids) + 1
            if row.wants_output:
                if row.is_prefill:
                    sequence.decodes_since = self._num_added
                self._append(sequence, tokens[sequence.sequence_id])

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.output_token_ids.append(token_id)
        sequence.deaths.clear()
        if sequence.run_alone:
            sequence.run_alone = False
            del self._alone[sequence.sequence_id]
        self._waiting.counters.charge(sequence.tenant, output_tokens=1)
        if sequence.next_branches:
            sequence.output_token_ids.clear()
            sequence.start_next_branch()
            self._waiting.counters.charge(sequence.tenant, prompt_tokens=sequence.num_unscheduled_tokens)
            self._prefilling[sequence.sequence_id] = sequence
        elif sequence.forced_token_id is not None or sequence.num_tokens == sequence.max_total_tokens:
            self.finish(sequence.sequence_id)
        else:
            self._ready[sequence.sequence_id] = sequence

    def _publish(self, row: ScheduledRow) -> None:
        """The blocks that this row filled hold what their keys say, on every stage: others may share them."""
        first = row.start // self.block_size_tokens
        for index, key in enumerate(self._filled_keys(row), start=first):
            self._pool.publish(row.block_table[index], key)

    def _filled_keys(self, row: ScheduledRow) -> list[bytes]:
        """Keys of the blocks that a row completes and that may be shared."""
        sequence, end = row.sequence, row.context_len
        if sequence.branch_start is not None:  # the slots from there on are written again by every branch
            end = min(end, sequence.branch_start)
        first, last = row.start // self.block_size_tokens, end // self.block_size_tokens
        if first >= last or not self._may_share(sequence):
            return []
        return sequence.keys(last, self.block_size_tokens)[first:last]

    def _may_share(self, sequence: Sequence) -> bool:
        return self.limits.prefix_caching and sequence.use_prefix_cache

    def _learn(self, micro_batch: MicroBatch, timing: StepTiming) -> None:
        prefill = [row for row in micro_batch.rows if row.is_prefill]
        self.costs.observe(
            timing,
            num_decodes=len(micro_batch.rows) - len(prefill),
            prefill_tokens=sum(row.num_tokens for row in prefill),
            prefill_pairs=sum(row.num_tokens * (row.start + row.num_tokens // 2) for row in prefill),
        )

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
        for row in micro_batch.rows:
            if row.is_prefill:
                for key in self._filled_keys(row):
                    self._being_filled[key] -= 1
                    if not self._being_filled[key]:
                        del self._being_filled[key]
        return micro_batch

    def finish(self, sequence_id: int) -> bool:
        """End a sequence (stop token, cancelled, expired) at any time; False if there is none of that id (any more).

        Its blocks are free as soon as no micro-batch in flight touches them.
        """
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return False
        sequence.finished = True
        self.num_background -= sequence.is_background
        self._alone.pop(sequence_id, None)
        if sequence.request_key is not None:
            siblings = self._by_request[sequence.request_key]
            del siblings[sequence_id]
            if not siblings:
                del self._by_request[sequence.request_key]
        if sequence_id in self._running:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        if len(self._deadlines) > 64 + 2 * len(self._sequences):  # mostly of sequences that ended
            self._deadlines = sorted(entry for entry in self._deadlines if not entry[2].finished)
        return True

    cancel = finish

    def run_alone(self, sequence_id: int) -> None:
        """Let nothing else be in flight with this sequence until it gets a token. Others wait for it."""
        sequence = self._sequences[sequence_id]
        sequence.run_alone = True
        self._alone[sequence_id] = sequence

    def hold(self, sequence_id: int) -> None:
        """Do not schedule the next token of a sequence, which just got one, before `let_go`."""
        if sequence_id in self._ready:
            self._held.add(sequence_id)

    def let_go(self, sequence_id: int) -> None:
        """End a `hold`; does nothing where there is none any more."""
        self._held.discard(sequence_id)

    def _start_running(self, sequence: Sequence, block_table: array[int], num_shared_blocks: int) -> None:
        sequence.block_table, sequence.num_shared_blocks = block_table, num_shared_blocks
        self._running[sequence.sequence_id] = sequence
        self._prefilling[sequence.sequence_id] = sequence

    def _stop_running(self, sequence: Sequence) -> None:
        """Take its blocks; those that micro-batches in flight touch rest in quarantine."""
        del self._running[sequence.sequence_id]
        self._prefilling.pop(sequence.sequence_id, None)
        self._ready.pop(sequence.sequence_id, None)
        self._held.discard(sequence.sequence_id)
        self._pool.free(sequence.block_table, last_step=sequence.in_flight_steps[-1] if sequence.in_flight_steps else 0)
        sequence.block_table = array("i")
        if sequence.registered:
            self._released[sequence.sequence_id] = None

    def reset(self, num_blocks: int) -> tuple[Sequence, ...]:
        """A new epoch with `num_blocks` empty blocks: nothing is in flight or cached, step ids restart from 1.

        All sequences wait to be computed again, those that ran first, and of these the shortest: so most of them go on
        soonest. Those that cannot fit `num_blocks` are finished and returned.
        """
        self._pool = BlockPool(num_blocks)
        self._in_flight.clear()
        self._in_flight_prefill.clear()
        self._being_filled.clear()
        self._last_step_id = 0
        self._prefilling.clear()
        self._ready.clear()
        self._held.clear()
        for sequence in [sequence for sequence in self._waiting if sequence.resumed]:
            self._waiting.remove(sequence)
            self._queue_again(sequence)
        for sequence in self._running.values():
            sequence.forget_cache()
            self._queue_again(sequence)
        self._running.clear()
        self._released.clear()  # stages forget all sequences of an older epoch
        too_long = tuple(sequence for sequence in self._sequences.values() if not self._fits(sequence))
        for sequence in too_long:
            self.finish(sequence.sequence_id)
        return too_long

    def _queue_again(self, sequence: Sequence) -> None:
        sequence.rebuild_tokens = sequence.num_tokens
        self._waiting.push(sequence)

    def _request_of(self, sequence: Sequence) -> Collection[Sequence]:
        """The live sequences of its request."""
        return (sequence,) if sequence.request_key is None else self._by_request[sequence.request_key].values()

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def _fits(self, sequence: Sequence) -> bool:
        # The last token is chosen but never computed, so it needs no slot.
        return self._num_blocks_for(sequence.max_total_tokens - 1) <= self._pool.num_blocks

    @property
    def live_sequences(self) -> tuple[Sequence, ...]:
        """Every sequence here, waiting or running, in the order they came."""
        return tuple(self._sequences.values())

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: new, preempted, or sent back by a reset."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to prefill for those, where nothing is cached."""
        return self._waiting.num_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks of this epoch."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be given to a sequence now, those of the prefix cache that nobody holds included."""
        return self._pool.num_free

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache that sequences hold."""
        return 1 - self._pool.num_free / self._pool.num_blocks

    def num_late(self, now_s: float) -> int:
        """Waiting sequences whose deadline comes before the queue, at its present rate, has emptied."""
        if not self._deadlines or not len(self._waiting):
            return 0
        empty_s = now_s + self._drain_rate.retry_after_s(self._waiting.num_tokens, now_s)
        return sum(one.deadline_s is not None and one.deadline_s < empty_s for one in self._waiting)

    @property
    def num_cached_blocks(self) -> int:
        """Of the free blocks, those whose content can be shared."""
        return self._pool.num_cached

    @property
    def num_in_flight(self) -> int:
        """Micro-batches sent and not returned."""
        return len(self._in_flight)

    @property
    def backlog_tokens(self) -> int:
        """Tokens that are not scheduled yet, of all prompts here."""
        prefilling = self._prefilling.values()
        return self._waiting.num_tokens + sum(one.num_unscheduled_tokens for one in prefilling)
