"""Random workloads on a simulated pipeline whose stages remember what they wrote into every KV slot."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.scheduler import MicroBatch, ScheduledRow, Scheduler, Sequence
from stageline.errors import InvalidArgumentError, ResourceExhaustedError

Slot = tuple[int, int, int]  # sequence id, position, token


def next_token(sequence_id: int, position: int) -> int:
    """What the simulated model chooses at `position`: depends on nothing else, so recomputing must not show."""
    return (sequence_id * 7919 + position * 104729) % 50021


class Stage:
    """Executes steps in order; every row must find in the cache exactly what its sequence wrote."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[Slot | None] = [None] * (num_blocks * block_size)
        self.registered: set[int] = set()
        self.failed: set[int] = set()  # sequences of a step that was not executed: their cache has a hole

    def execute(self, step: MicroBatch) -> None:
        self.registered -= set(step.released_sequence_ids)
        for row in step.rows:
            for position, token in enumerate(row.token_ids, start=row.start):
                self.slots[self._slot(row, position)] = (row.sequence.sequence_id, position, token)
        for row in step.rows:  # after all writes: two owners of one slot would show
            sequence_id, num_prompt = row.sequence.sequence_id, len(row.sequence.prompt_token_ids)
            if sequence_id in self.failed:
                continue
            for position in range(row.context_len):
                expected = row.sequence.prompt_token_ids[position] if position < num_prompt else None
                if expected is None:
                    expected = next_token(sequence_id, position)
                assert self.slots[self._slot(row, position)] == (sequence_id, position, expected)
            if row.needs_registration:
                assert row.wants_output
                self.registered.add(sequence_id)
            if row.wants_output:
                assert sequence_id in self.registered, "the last stage has no history for the penalties"

    def _slot(self, row: ScheduledRow, position: int) -> int:
        return row.block_table[position // self.block_size] * self.block_size + position % self.block_size


class SimulatedPipeline(RuleBasedStateMachine):
    """The first stage executes a step when it is sent, the last one just before it returns."""

    @initialize(
        num_blocks=st.integers(3, 24),
        block_size=st.integers(1, 5),
        max_step_tokens=st.integers(1, 24),
        max_step_sequences=st.integers(1, 6),
        max_in_flight=st.integers(1, 5),
        min_prefill_tokens=st.integers(1, 8),
    )
    def start(self, num_blocks: int, block_size: int, **limits: int) -> None:
        self.block_size = block_size
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size_tokens=block_size, max_waiting_sequences=12, **limits
        )
        self.live: dict[int, Sequence] = {}
        self.waiting_ids: set[int] = set()
        self.num_sequences = 0
        self.new_epoch(num_blocks)

    def new_epoch(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.first_stage = Stage(num_blocks, self.block_size)
        self.last_stage = Stage(num_blocks, self.block_size)
        self.flying: deque[MicroBatch] = deque()
        self.last_step_id = 0
        self.waiting_ids = set(self.live)

    @rule(
        num_prompt=st.integers(1, 30),
        num_resumed=st.integers(0, 4),
        max_tokens=st.integers(1, 20),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def add(self, num_prompt: int, num_resumed: int, max_tokens: int, priority: int) -> None:
        sequence_id = self.num_sequences
        self.num_sequences += 1
        sequence = Sequence(
            sequence_id=sequence_id,
            prompt_token_ids=tuple(range(1000, 1000 + num_prompt)),
            output_token_ids=[next_token(sequence_id, num_prompt + i) for i in range(num_resumed)],
            max_total_tokens=num_prompt + num_resumed + max_tokens,
            priority=priority,
        )
        num_slots = sequence.max_total_tokens - 1
        try:
            self.scheduler.add(sequence)
        except InvalidArgumentError:
            assert num_slots > self.num_blocks * self.block_size
        except ResourceExhaustedError:
            assert self.scheduler.num_waiting >= 12  # preempted ones come back whatever the limit
        else:
            assert num_slots <= self.num_blocks * self.block_size
            self.live[sequence_id] = sequence
            self.waiting_ids.add(sequence_id)

    @rule()
    def send(self) -> None:
        preemptions = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        if step is None:
            full = len(self.flying) >= self.scheduler.max_in_flight
            assert full or self.flying or not self.live, "nothing is in flight and nothing is scheduled: a deadlock"
            return
        self.check(step)
        if self.scheduler.num_preemptions == preemptions:
            self.check_admission_order(step)
        self.waiting_ids = {id_ for id_, sequence in self.live.items() if not sequence.block_table}
        self.first_stage.execute(step)
        self.flying.append(step)

    def check(self, step: MicroBatch) -> None:
        self.last_step_id += 1
        assert step.step_id == self.last_step_id
        assert len(self.flying) < self.scheduler.max_in_flight
        assert 0 < len(step.rows) <= self.scheduler.max_step_sequences
        assert 0 < step.num_tokens <= self.scheduler.max_step_tokens
        sizes = [row.num_tokens != 1 for row in step.rows]
        assert sizes == sorted(sizes), "rows of one token come first"
        assert len({row.sequence.sequence_id for row in step.rows}) == len(step.rows)
        for row in step.rows:
            sequence = row.sequence
            everything = [*sequence.prompt_token_ids, *sequence.output_token_ids]
            assert self.live[sequence.sequence_id] is sequence, "a row of a sequence that ended"
            assert list(row.token_ids) == everything[row.start : row.start + row.num_tokens]
            assert row.context_len == row.start + row.num_tokens
            assert len(row.block_table) == -(-row.context_len // self.block_size)
            assert row.wants_output == (row.context_len == len(everything))
            assert row.output_position == len(sequence.output_token_ids)
            in_flight = [r for s in self.flying for r in s.rows if r.sequence is sequence]
            assert not any(r.wants_output for r in in_flight), "its next token is not known yet"
            assert row.start == (in_flight[-1].context_len if in_flight else sequence.num_computed_tokens)
            for flying in self.flying:
                for other in flying.rows:
                    if other.sequence is not sequence:
                        assert not set(row.block_table) & set(other.block_table), "reused while in flight"

    def check_admission_order(self, step: MicroBatch) -> None:
        admitted = {row.sequence.sequence_id for row in step.rows} & self.waiting_ids
        for early in admitted:
            for late in self.waiting_ids - admitted:
                first, second = self.live[early], self.live[late]
                assert (-first.priority, first.arrival) < (-second.priority, second.arrival)

    @precondition(lambda self: self.flying)
    @rule(stops=st.integers(0, 9))
    def receive(self, stops: int) -> None:
        step = self.flying.popleft()
        self.last_stage.execute(step)
        rows = [row for row in step.rows if row.wants_output and row.sequence.sequence_id in self.live]
        tokens = {row.sequence.sequence_id: next_token(row.sequence.sequence_id, row.context_len) for row in rows}
        self.scheduler.complete(step.step_id, tokens)
        for row in rows:
            sequence = row.sequence
            assert sequence.num_tokens == row.context_len + 1
            if sequence.num_tokens == sequence.max_total_tokens:
                assert sequence.finished
                self.end(sequence.sequence_id)
            elif stops == 0:  # a stop token
                assert self.scheduler.finish(sequence.sequence_id)
                self.end(sequence.sequence_id)

    def end(self, sequence_id: int) -> None:
        sequence = self.live.pop(sequence_id)
        self.waiting_ids.discard(sequence_id)
        assert sequence.finished
        num_prompt = len(sequence.prompt_token_ids)
        expected = [next_token(sequence_id, num_prompt + i) for i in range(len(sequence.output_token_ids))]
        assert sequence.output_token_ids == expected

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 50))
    def cancel(self, pick: int) -> None:
        sequence_id = sorted(self.live)[pick % len(self.live)]
        assert self.scheduler.cancel(sequence_id)
        self.end(sequence_id)

    @precondition(lambda self: self.flying)
    @rule()
    def fail(self) -> None:
        """A stage could not execute the step, so the last one never sees it."""
        step = self.flying.popleft()
        alive = [row.sequence for row in step.rows if row.sequence.sequence_id in self.live]
        assert list(self.scheduler.fail(step.step_id)) == alive
        for sequence in alive:
            self.end(sequence.sequence_id)
        self.last_stage.failed |= {row.sequence.sequence_id for row in step.rows}

    @rule(num_blocks=st.integers(3, 24))
    def reset(self, num_blocks: int) -> None:
        too_long = {sequence.sequence_id for sequence in self.scheduler.reset(num_blocks)}
        capacity = num_blocks * self.block_size
        assert too_long == {id_ for id_, seq in self.live.items() if seq.max_total_tokens - 1 > capacity}
        for sequence_id in too_long:
            self.end(sequence_id)
        self.new_epoch(num_blocks)
        assert self.scheduler.num_waiting == len(self.live)

    @rule(max_in_flight=st.integers(1, 5))
    def set_max_in_flight(self, max_in_flight: int) -> None:
        self.scheduler.max_in_flight = max_in_flight

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.num_in_flight == len(self.flying)
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def teardown(self) -> None:
        """Everything that is alive ends, within the steps that computing all of it one by one could take."""
        if not hasattr(self, "scheduler"):
            return
        limit = 50 + 20 * sum(sequence.max_total_tokens for sequence in self.live.values())
        for _ in range(limit):
            if not self.live:
                break
            sent = self.last_step_id
            self.send()
            if self.last_step_id == sent and self.flying:
                self.receive(stops=1)
            self.scheduler.check_integrity()
        assert not self.live, "sequences that never end"
        while self.flying:
            self.receive(stops=1)
        self.scheduler.check_integrity()
        assert self.scheduler.num_free_blocks == self.num_blocks, "a block is lost"


SimulatedPipeline.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSimulatedPipeline = SimulatedPipeline.TestCase


def run_workload(seed: int) -> int:
    """A long, busy run, deeper than what hypothesis explores. Returns the number of preemptions."""
    rng = random.Random(seed)
    pipeline = SimulatedPipeline()
    num_blocks = rng.randint(6, 24)
    pipeline.start(
        num_blocks=num_blocks,
        block_size=rng.randint(1, 5),
        max_step_tokens=rng.choice([1, 7, 24, 100]),
        max_step_sequences=rng.choice([1, 3, 8]),
        max_in_flight=rng.randint(1, 5),
        min_prefill_tokens=rng.randint(1, 8),
    )
    may_disturb = rng.random() < 0.5
    for _ in range(300):
        action = rng.random()
        if action < 0.15:
            priority = rng.choice([0, 0, 0, 1, -1])
            pipeline.add(rng.randint(1, 12), rng.choice([0, 0, 3]), rng.randint(1, 25), priority)
        elif action < 0.6:
            pipeline.send()
        elif action < 0.96 and pipeline.flying:
            pipeline.receive(stops=rng.randint(0, 60))
        elif may_disturb and action > 0.985 and pipeline.live:
            pipeline.cancel(pick=rng.randrange(100))
        elif may_disturb and action > 0.97 and pipeline.flying:
            pipeline.fail()
        elif may_disturb and action > 0.966:
            pipeline.reset(num_blocks=rng.randint(6, 24))
        pipeline.holds()
    pipeline.teardown()
    return pipeline.scheduler.num_preemptions


@pytest.mark.parametrize("first_seed", [0, 100, 200])
def test_every_request_of_long_random_workloads_ends(first_seed: int) -> None:
    num_preemptions = [run_workload(seed) for seed in range(first_seed, first_seed + 100)]
    assert sum(count > 0 for count in num_preemptions) > 20, "the workloads do not fill the cache"
