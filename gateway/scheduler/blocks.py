"""Which KV blocks a sequence gets, shares with others, and gives up for them."""

from __future__ import annotations

from array import array
from operator import attrgetter

from gateway.scheduler.ledger import Ledger
from gateway.scheduler.sequence import Sequence

by_rank = attrgetter("rank")


class Blocks(Ledger):
    """How a sequence comes to run and goes on: admission, prefix sharing, preemption. What goes into a micro-batch is `Scheduler`'s."""

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Of a sequence that is not here, the tokens that the prefix cache would save now."""
        return len(self._cached_blocks(sequence, 0)) * self.block_size_tokens

    def _num_shareable(self, sequence: Sequence) -> int:
        """Its full blocks of tokens that need not be computed."""
        return sequence.num_shareable_tokens // self.block_size_tokens

    def _cached_blocks(self, sequence: Sequence, first: int) -> list[int]:
        """Published blocks for its blocks `first`, `first` + 1, ..."""
        if not self._may_share(sequence):
            return []
        blocks: list[int] = []
        for index in range(first, self._num_shareable(sequence)):
            block = self._pool.find(sequence.keys(index + 1, self.block_size_tokens)[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _has_slot(self, sequence: Sequence, *, last_resort: bool) -> bool:
        """Whether the next token of a ready sequence has a place in the cache; finds it one if that can be."""
        if len(sequence.block_table) * self.block_size_tokens >= sequence.num_tokens:
            return True
        if not last_resort and self._pool.num_free < len(self._running) and self._over_share(sequence, 1):
            return False  # one for each of the others comes first
        while not self._pool.num_free:
            if not self._preempt_for(sequence):
                return False
        sequence.block_table.extend(self._pool.allocate(1))
        return True

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Stop the running sequence that ranks last, if it ranks after this one and is not in flight."""
        if self._pool.num_quarantined:
            return False  # blocks are on their way back: one return is a shorter wait than computing a sequence again
        candidates = (other for other in self._running.values() if not other.in_flight_steps)
        victim = max(candidates, key=by_rank)
        if victim is sequence:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._stop_running(victim)
        victim.forget_cache()
        self._waiting.push(victim)
        self.num_preemptions += 1

    def _over_share(self, sequence: Sequence, num_more_blocks: int) -> bool:
        """Whether its request, with so many blocks more, would hold more of the cache than one may while there are others.
        A request that holds nothing may always begin."""
        own = self._request_of(sequence)
        if len(own) == len(self._sequences):
            return False
        num_held = sum(len(one.block_table) - one.num_shared_blocks for one in own)
        return num_held > 0 and num_held + num_more_blocks > self.limits.max_request_kv_fraction * self._pool.num_blocks

    def _may_be_admitted(self, sequence: Sequence) -> bool:
        over_share = self._over_share(sequence, self._num_blocks_for(sequence.num_tokens))
        return not over_share and not self._waits_for_prefix(sequence)

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether its next blocks are being computed in flight for another sequence, so that it is better off waiting."""
        if not self._being_filled or not self._may_share(sequence):
            return False
        first = sequence.num_scheduled_tokens // self.block_size_tokens
        first += len(self._cached_blocks(sequence, first))
        last = min(first + self._num_blocks_for(self.limits.min_prefill_tokens), self._num_shareable(sequence))
        if first >= last:
            return False
        keys = sequence.keys(last, self.block_size_tokens)
        return all(key in self._being_filled for key in keys[first:last])

    def _allocate(self, sequence: Sequence) -> bool:
        """Make a waiting sequence run, if there are blocks for all its tokens."""
        shared = self._cached_blocks(sequence, 0)
        num_new = self._num_blocks_for(sequence.num_tokens) - len(shared)
        num_taken = num_new + sum(self._pool.counts_as_free(block) for block in shared)
        if num_taken + len(self._running) > self._pool.num_free:
            return False
        for block in shared:
            self._pool.share(block)
        self._waiting.serve(sequence)
        self._start_running(sequence, array("i", shared + self._pool.allocate(num_new)), len(shared))
        sequence.first_run, sequence.resumed = not sequence.resumed, True
        sequence.rebuild_tokens = 0
        self._skip(sequence, len(shared) * self.block_size_tokens)
        if sequence.first_run:
            self._waiting.counters.charge(sequence.tenant, prompt_tokens=sequence.num_unscheduled_tokens)
        self._drain_rate.observe(sequence.num_tokens, self._now_s)
        return True

    def _adopt(self, sequence: Sequence) -> None:
        """Share what was published since a running prompt got its blocks: prompts that came together with the same
        beginning compute it once."""
        first = sequence.num_scheduled_tokens // self.block_size_tokens
        shared = self._cached_blocks(sequence, first)
        if not shared:
            return
        for block in shared:
            self._pool.share(block)
        own = sequence.block_table[first : first + len(shared)]
        sequence.block_table[first : first + len(shared)] = array("i", shared)
        self._pool.free(own, last_step=sequence.in_flight_steps[-1] if sequence.in_flight_steps else 0)
        sequence.num_shared_blocks += len(shared)
        self._skip(sequence, (first + len(shared)) * self.block_size_tokens)

    def _skip(self, sequence: Sequence, position: int) -> None:
        """Tokens before `position` need not be computed."""
        if sequence.first_run:
            num_prompt = len(sequence.prompt_token_ids)
            skipped = min(position, num_prompt) - min(sequence.num_scheduled_tokens, num_prompt)
            sequence.num_cached_prompt_tokens += skipped
        sequence.num_scheduled_tokens = position
        if not sequence.in_flight_steps:
            sequence.num_computed_tokens = position
