"""Invariants of a scheduler: for tests, and for the check of an idle pipeline."""

from __future__ import annotations

from collections import Counter

from gateway.scheduler.ledger import Ledger
from gateway.scheduler.sequence import Sequence


def check_integrity(ledger: Ledger) -> None:
    """Every invariant, or AssertionError. Costs time in proportion to all blocks and tokens."""
    running = ledger._running
    ledger._pool.check_integrity(block for sequence in running.values() for block in sequence.block_table)
    waiting = list(ledger._waiting)
    assert {*running, *(sequence.sequence_id for sequence in waiting)} == set(ledger._sequences)
    assert len(running) + len(waiting) == len(ledger._sequences)
    assert len(ledger._waiting) == len(waiting)
    assert ledger._waiting.num_tokens == sum(sequence.num_tokens for sequence in waiting)
    in_background = sum(sequence.num_tokens for sequence in waiting if sequence.is_background)
    assert ledger._waiting.num_tokens_of(True) == in_background
    assert ledger.num_background == sum(sequence.is_background for sequence in ledger._sequences.values())
    for sequence in waiting:
        assert not sequence.block_table
        assert not sequence.in_flight_steps
        assert not sequence.registered
        assert sequence.num_computed_tokens == sequence.num_scheduled_tokens == 0
    assert not ledger._prefilling.keys() & ledger._ready.keys()
    assert ledger._held <= ledger._ready.keys()
    for sequence_id, sequence in running.items():
        steps = [step.step_id for step in ledger._in_flight if any(row.sequence is sequence for row in step.rows)]
        assert list(sequence.in_flight_steps) == steps
        num_unscheduled = sequence.num_unscheduled_tokens
        assert (sequence_id in ledger._ready) == (num_unscheduled == 1 and sequence_id not in ledger._prefilling)
        assert (sequence_id in ledger._prefilling or sequence_id in ledger._ready) == (num_unscheduled > 0)
        assert sequence_id not in ledger._ready or not steps, "a ready sequence is in flight"
        assert 0 <= sequence.num_computed_tokens <= sequence.num_scheduled_tokens <= sequence.num_tokens
        assert len(sequence.block_table) >= ledger._num_blocks_for(sequence.num_scheduled_tokens)
        assert sequence.num_tokens < sequence.max_total_tokens
        assert sequence.resumed, "a running sequence would be queued as if it had never run"
    by_request: dict[int, dict[int, Sequence]] = {}
    for sequence_id, sequence in ledger._sequences.items():
        if sequence.request_key is not None:
            by_request.setdefault(sequence.request_key, {})[sequence_id] = sequence
    assert ledger._by_request == by_request
    for step in ledger._in_flight:
        for row in step.rows:
            held = row.sequence.block_table
            for index, block in enumerate(row.block_table):
                if index >= len(held) or held[index] != block:  # ended, or a cached block took its place
                    assert not ledger._pool.may_be_given(block), "a block in flight could be given to another sequence"
    filled = Counter(
        key for step in ledger._in_flight for row in step.rows if row.is_prefill for key in ledger._filled_keys(row)
    )
    assert filled == ledger._being_filled
    alone = {sequence_id for sequence_id, sequence in ledger._sequences.items() if sequence.run_alone}
    assert alone == ledger._alone.keys()
    live_registered = {s.sequence_id for s in ledger._sequences.values() if s.registered}
    assert not live_registered & ledger._released.keys(), "the history of a live sequence would be forgotten"
    for sequence in ledger._sequences.values():
        assert sequence.deadline_s is None or any(entry[2] is sequence for entry in ledger._deadlines)
