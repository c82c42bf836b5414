"""A pipeline around the scheduler, without processes: rules that hypothesis draws, and checks of all that it promises."""

from __future__ import annotations

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_stage import Stage, contents, next_token

from gateway.scheduler import (
    PROBE_PRIORITY,
    MicroBatch,
    ScheduledRow,
    Scheduler,
    SchedulerLimits,
    Sequence,
    StepTiming,
    check_integrity,
)
from stageline.errors import InvalidArgumentError, ResourceExhaustedError

MAX_WAITING, MAX_WAITING_TOKENS = 12, 200


class SimulatedPipeline(RuleBasedStateMachine):
    """The first stage executes a step when it is sent, the last one just before it returns."""

    @initialize(
        num_blocks=st.integers(3, 24),
        block_size=st.integers(1, 5),
        max_step_tokens=st.integers(1, 24),
        max_step_sequences=st.integers(1, 6),
        max_in_flight=st.integers(1, 5),
        num_stages=st.integers(1, 5),
        min_prefill_tokens=st.integers(1, 8),
        max_request_kv_fraction=st.sampled_from([0.3, 1.0]),
        prefix_caching=st.booleans(),
    )
    def start(self, num_blocks: int, block_size: int, max_in_flight: int, num_stages: int, **limits: int) -> None:
        self.block_size = block_size
        limits = SchedulerLimits(max_waiting_sequences=MAX_WAITING, max_waiting_tokens=MAX_WAITING_TOKENS, **limits)
        self.limits = limits
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size_tokens=block_size,
            max_in_flight=max_in_flight,
            num_stages=num_stages,
            limits=limits,
        )
        self.now_s = 0.0
        self.num_cached_tokens = 0
        self.live: dict[int, Sequence] = {}
        self.sequences: dict[int, Sequence] = {}  # all that ever were
        self.ran_before: set[int] = set()
        self.waiting_ids: set[int] = set()
        self.num_sequences = 0
        self.wanted: dict[int, deque[int]] = {}  # targets whose scores have not come back
        self.alternatives_due: set[int] = set()  # sequences whose other first tokens are not scored yet
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
        priority=st.sampled_from([0, 0, 0, 0, 1, -1, PROBE_PRIORITY]),
        prefix=st.integers(0, 2),
        differs_from=st.integers(0, 40),
        who=st.sampled_from(["", "", "", "tenant", "salt", "no cache"]),
        request_key=st.sampled_from([None, None, 1, 2]),
        lives_s=st.sampled_from([None, None, None, 5.0, 50.0]),
        run_alone=st.sampled_from([False] * 9 + [True]),
        score_from=st.sampled_from([None, None, 1, 5]),
        branches=st.sampled_from([None, None, None, (1,), (3, 2), (7, 7, 2, 2)]),
    )
    def add(
        self,
        num_prompt: int,
        num_resumed: int = 0,
        max_tokens: int = 1,
        priority: int = 0,
        prefix: int = 0,
        differs_from: int = 0,
        who: str = "",
        request_key: int | None = None,
        lives_s: float | None = None,
        run_alone: bool = False,
        score_from: int | None = None,
        branches: tuple[int, ...] | None = None,
    ) -> None:
        sequence_id = self.num_sequences
        self.num_sequences += 1
        prompt = [1000 * (prefix if at < differs_from else 10 + sequence_id) + at for at in range(num_prompt)]
        if score_from is not None and score_from >= num_prompt:
            score_from = None
        wanted = [] if score_from is None else prompt[score_from:]
        scoring: dict[str, object] = {"score_from": score_from}
        if branches is not None:  # lengths of the continuations of one context
            continuations = [
                [*range(start := 7 * 10**6 + 1000 * sequence_id + 100 * i, start + length - 1),
                 next_token(sequence_id, num_prompt + length - 1)]
                for i, length in enumerate(branches)
            ]  # fmt: skip
            wanted = continuations[0] + [token for one in continuations[1:] for token in one[1:]]
            scoring = {
                "score_from": num_prompt,
                "forced_token_id": continuations[0][-1],
                "branch_start": num_prompt,
                "next_branches": tuple(map(tuple, continuations[1:])),
                "first_ids": tuple(one[0] for one in continuations[1:]),
            }
            prompt += continuations[0][:-1]
            num_prompt, num_resumed, max_tokens = len(prompt), 0, 1
        sequence = Sequence(
            **scoring,
            sequence_id=sequence_id,
            prompt_token_ids=tuple(prompt),
            output_token_ids=[next_token(sequence_id, num_prompt + i) for i in range(num_resumed)],
            max_total_tokens=num_prompt + num_resumed + max_tokens,
            priority=priority,
            tenant="other" if who == "tenant" else "",
            cache_salt="salt" if who == "salt" else "",
            use_prefix_cache=who != "no cache",
            request_key=request_key,
            deadline_s=None if lives_s is None else self.now_s + lives_s,
            run_alone=run_alone,
        )
        num_slots = sequence.max_total_tokens - 1
        waiting = [self.live[id_] for id_ in self.waiting_ids]
        waiting_tokens = sum(one.num_tokens for one in waiting)
        try:
            self.scheduler.add(sequence)
        except InvalidArgumentError:
            assert num_slots > self.num_blocks * self.block_size
        except ResourceExhaustedError as error:  # preempted ones come back whatever the limit
            full = waiting_tokens + sequence.num_tokens > MAX_WAITING_TOKENS
            assert len(waiting) >= MAX_WAITING or (waiting and full)
            assert "retry_after_s" in error.metadata  # noqa: PT017
        else:
            assert num_slots <= self.num_blocks * self.block_size
            assert len(waiting) < MAX_WAITING
            self.live[sequence_id] = self.sequences[sequence_id] = sequence
            self.wanted[sequence_id] = deque(wanted)
            if sequence.first_ids:
                self.alternatives_due.add(sequence_id)
            self.waiting_ids.add(sequence_id)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 50))
    def run_alone(self, pick: int) -> None:
        self.scheduler.run_alone(sorted(self.live)[pick % len(self.live)])

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        due = {id_ for id_, one in self.live.items() if one.deadline_s is not None and one.deadline_s <= self.now_s}
        expired = self.scheduler.expire(self.now_s)
        assert {sequence.sequence_id for sequence in expired} == due
        for sequence in expired:
            self.end(sequence.sequence_id)

    @rule()
    def send(self) -> None:
        preemptions = self.scheduler.num_preemptions
        rebuilt = {id_: sequence.rebuild_tokens for id_, sequence in self.live.items()}
        step = self.scheduler.schedule()
        if step is None:
            full = len(self.flying) >= self.scheduler.max_in_flight
            idle = full or self.flying or not self.live or self.scheduler._held
            assert idle, "nothing is in flight and nothing is scheduled: a deadlock"
            return
        self.check(step)
        if self.scheduler.num_preemptions == preemptions:
            self.check_admission_order(step, rebuilt)
        self.check_alone(step)
        self.ran_before = {id_ for id_, sequence in self.live.items() if sequence.resumed}
        self.waiting_ids = {id_ for id_, sequence in self.live.items() if not sequence.block_table}
        self.first_stage.execute(step)
        self.flying.append(step)

    def check(self, step: MicroBatch) -> None:
        self.last_step_id += 1
        assert step.step_id == self.last_step_id
        assert len(self.flying) < self.scheduler.max_in_flight
        assert 0 < len(step.rows) <= self.limits.max_step_sequences
        assert 0 < step.num_tokens <= self.limits.max_step_tokens
        sizes = [row.num_tokens != 1 for row in step.rows]
        assert sizes == sorted(sizes), "rows of one token come first"
        assert len({row.sequence.sequence_id for row in step.rows}) == len(step.rows)
        for row in step.rows:
            sequence = row.sequence
            assert sequence.sequence_id not in self.scheduler._held
            everything = [*sequence.prompt_token_ids, *sequence.output_token_ids]
            assert self.live[sequence.sequence_id] is sequence, "a row of a sequence that ended"
            assert list(row.token_ids) == everything[row.start : row.start + row.num_tokens]
            assert row.context_len == row.start + row.num_tokens
            assert len(row.block_table) == -(-row.context_len // self.block_size)
            assert row.wants_output == (row.context_len == len(everything))
            assert row.output_position == len(sequence.output_token_ids)
            known = [*everything, sequence.forced_token_id]
            first = row.start + row.scored_from + 1
            assert list(row.target_ids) == known[first : first + len(row.target_ids)]
            assert row.scored_from + len(row.target_ids) <= row.num_tokens
            in_flight = [r for s in self.flying for r in s.rows if r.sequence is sequence]
            assert not any(r.wants_output for r in in_flight), "its next token is not known yet"
            came_so_far = in_flight[-1].context_len if in_flight else 0
            if row.start != max(came_so_far, sequence.num_computed_tokens):
                assert row.start > came_so_far, "tokens are computed twice"
                assert row.start % self.block_size == 0, "only full blocks are skipped"
            for flying in self.flying:
                for other in flying.rows:
                    if other.sequence is not sequence:
                        self.check_shared(row, other)

    def check_shared(self, row: ScheduledRow, other: ScheduledRow) -> None:
        """Two rows in flight share only full blocks of the same tokens that neither of them writes."""
        if not set(row.block_table) & set(other.block_table):
            return
        for index, (block, its) in enumerate(zip(row.block_table, other.block_table, strict=False)):
            if block == its:
                end = (index + 1) * self.block_size
                assert end <= row.start, "a shared block is written"
                assert end <= other.start, "a shared block is written"
                assert contents(row.sequence, end) == contents(other.sequence, end)
                assert self.limits.prefix_caching
                assert row.sequence.use_prefix_cache
        aligned = sum(a == b for a, b in zip(row.block_table, other.block_table, strict=False))
        assert aligned == len(set(row.block_table) & set(other.block_table)), "reused while in flight"

    def check_admission_order(self, step: MicroBatch, rebuilt: dict[int, int]) -> None:
        """By priority; those that ran before the others, those that are rebuilt by length; of one tenant in the order they came.
        `rebuilt`: tokens that each was to compute again before the step was scheduled."""
        admitted = {row.sequence.sequence_id for row in step.rows} & self.waiting_ids
        for early in admitted:
            for late in self.waiting_ids - admitted:
                first, second = self.live[early], self.live[late]
                if first.run_alone or second.request_key is not None:  # ahead of all; passed over for its share
                    continue
                if self.is_being_computed(second, step):
                    continue
                assert first.priority >= second.priority
                if first.priority == second.priority:
                    assert early in self.ran_before or late not in self.ran_before
                    if early in self.ran_before and late in self.ran_before:
                        assert (rebuilt[early], first.arrival) < (rebuilt[late], second.arrival)
                    elif early not in self.ran_before and late not in self.ran_before and first.tenant == second.tenant:
                        assert first.arrival < second.arrival

    def is_being_computed(self, sequence: Sequence, step: MicroBatch) -> bool:
        """Whether a prompt in flight begins with the same block, which is worth waiting for."""
        end = self.block_size
        if not self.limits.prefix_caching or not sequence.use_prefix_cache or sequence.num_tokens <= end:
            return False
        prompts = [row.sequence for other in [*self.flying, step] for row in other.rows if row.is_prefill]
        return any(one.num_tokens >= end and contents(one, end) == contents(sequence, end) for one in prompts)

    def check_alone(self, step: MicroBatch) -> None:
        alone = {id_ for id_, sequence in self.live.items() if sequence.run_alone}
        out = {row.sequence.sequence_id for other in [*self.flying, step] for row in other.rows}
        if alone:
            assert len(out) == 1, "something else is in flight"
            assert out <= alone or self.sequences[next(iter(out))].priority == PROBE_PRIORITY

    @precondition(lambda self: self.flying)
    @rule(stops=st.integers(0, 9), seconds=st.floats(0, 1))
    def receive(self, stops: int, seconds: float = 0.1) -> None:
        step = self.flying.popleft()
        self.last_stage.execute(step)
        rows = [row for row in step.rows if row.wants_output and row.sequence.sequence_id in self.live]
        for row in step.rows:
            if row.sequence.sequence_id in self.live:
                due = self.wanted[row.sequence.sequence_id]
                assert row.target_ids == tuple(due.popleft() for _ in row.target_ids), "scored twice, or left out"
                if row.alternative_ids:
                    assert row.start + row.scored_from + 1 == row.sequence.branch_start
                    self.alternatives_due.remove(row.sequence.sequence_id)
        tokens = {row.sequence.sequence_id: next_token(row.sequence.sequence_id, row.context_len) for row in rows}
        for row in rows:
            assert row.sequence.forced_token_id in (None, tokens[row.sequence.sequence_id])
        branching = {row.sequence.sequence_id for row in rows if row.sequence.next_branches}
        timing = StepTiming(slowest_stage_s=seconds, overhead_s=(step.step_id % 7) / 10)
        self.scheduler.complete(step.step_id, tokens, timing=timing)
        for row in rows:
            sequence = row.sequence
            if sequence.sequence_id in branching:
                assert not sequence.finished
                assert sequence.num_scheduled_tokens == sequence.branch_start
                continue
            assert sequence.num_tokens == row.context_len + 1
            assert not self.wanted[sequence.sequence_id], "some tokens were not scored"
            assert sequence.sequence_id not in self.alternatives_due
            if sequence.num_tokens == sequence.max_total_tokens or sequence.forced_token_id is not None:
                assert sequence.finished
                self.end(sequence.sequence_id)
            elif stops == 0:  # a stop token
                assert self.scheduler.finish(sequence.sequence_id)
                self.end(sequence.sequence_id)

    def end(self, sequence_id: int) -> None:
        sequence = self.live.pop(sequence_id)
        self.num_cached_tokens += sequence.num_cached_prompt_tokens
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

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 50))
    def hold(self, pick: int) -> None:
        self.scheduler.hold(sorted(self.live)[pick % len(self.live)])

    @rule()
    def let_go(self) -> None:
        for sequence_id in self.live:
            self.scheduler.let_go(sequence_id)

    @rule(max_in_flight=st.integers(1, 5))
    def set_max_in_flight(self, max_in_flight: int) -> None:
        self.scheduler.max_in_flight = max_in_flight

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            check_integrity(self.scheduler)
            assert self.scheduler.num_in_flight == len(self.flying)
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def teardown(self) -> None:
        """Everything that is alive ends, within the steps that computing all of it one by one could take."""
        if not hasattr(self, "scheduler"):
            return
        self.let_go()
        limit = 50 + 20 * sum(sequence.max_total_tokens for sequence in self.live.values())
        for _ in range(limit):
            if not self.live:
                break
            sent = self.last_step_id
            self.send()
            if self.last_step_id == sent and self.flying:
                self.receive(stops=1)
            check_integrity(self.scheduler)
        assert not self.live, "sequences that never end"
        while self.flying:
            self.receive(stops=1)
        check_integrity(self.scheduler)
        assert self.scheduler.num_free_blocks == self.num_blocks, "a block is lost"
