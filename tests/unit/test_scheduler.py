"""Directed tests of the scheduler: spread, chunking, order, preemption, limits, failures."""

from __future__ import annotations

import pytest

from gateway.scheduler import MicroBatch, Scheduler, SchedulerLimits, Sequence, check_integrity
from stageline.errors import InvalidArgumentError, ResourceExhaustedError

BLOCK_SIZE = 4


def make_scheduler(**settings: int) -> Scheduler:
    """Settings of the scheduler and limits together."""
    limits = {name: settings.pop(name) for name in list(settings) if name in SchedulerLimits.__dataclass_fields__}
    return Scheduler(
        **{"num_blocks": 1000, "block_size_tokens": BLOCK_SIZE, **settings},
        limits=SchedulerLimits(**{"min_prefill_tokens": 1, "prefix_caching": False, **limits}),
    )


def make_sequence(sequence_id: int, num_prompt: int = 3, max_tokens: int = 50, **fields: object) -> Sequence:
    prompt = tuple(range(100, 100 + num_prompt))
    return Sequence(
        sequence_id=sequence_id, prompt_token_ids=prompt, max_total_tokens=num_prompt + max_tokens, **fields
    )


def complete(scheduler: Scheduler, step: MicroBatch, token: int = 7) -> None:
    scheduler.complete(step.step_id, {row.sequence.sequence_id: token for row in step.rows if row.wants_output})
    check_integrity(scheduler)


def drain_slots(scheduler: Scheduler) -> list[MicroBatch]:
    steps = []
    while (step := scheduler.schedule()) is not None:
        steps.append(step)
        check_integrity(scheduler)
    return steps


def shape(step: MicroBatch) -> list[tuple[int, int, int]]:
    return [(row.sequence.sequence_id, row.start, row.num_tokens) for row in step.rows]


def decoding(num_sequences: int, **limits: int) -> Scheduler:
    """A scheduler whose sequences 0..n-1 are all ready to decode, nothing in flight."""
    scheduler = make_scheduler(**{**limits, "max_in_flight": 1})
    for sequence_id in range(num_sequences):
        scheduler.add(make_sequence(sequence_id))
    step = scheduler.schedule()
    assert step is not None
    assert len(step.rows) == num_sequences
    complete(scheduler, step)
    scheduler.max_in_flight = scheduler.num_stages = limits.get("max_in_flight", 1)
    return scheduler


@pytest.mark.parametrize(
    ("num_sequences", "max_in_flight", "sizes"),
    [(8, 1, [8]), (8, 4, [2, 2, 2, 2]), (5, 4, [2, 1, 1, 1]), (3, 4, [1, 1, 1]), (9, 2, [5, 4])],
)
def test_decodes_spread_evenly_over_the_slots(num_sequences: int, max_in_flight: int, sizes: list[int]) -> None:
    scheduler = decoding(num_sequences, max_in_flight=max_in_flight)
    for _ in range(3):
        steps = drain_slots(scheduler)
        assert [len(step.rows) for step in steps] == sizes
        for step in steps:
            complete(scheduler, step)


def test_an_uneven_spread_evens_out() -> None:
    scheduler = decoding(8, max_in_flight=1)
    step = scheduler.schedule()
    assert step is not None
    scheduler.max_in_flight = scheduler.num_stages = 4
    complete(scheduler, step)  # all eight come back at once, into a pipeline of four slots
    assert [len(step.rows) for step in drain_slots(scheduler)] == [2, 2, 2, 2]


def test_no_sequence_decodes_twice_at_once_and_none_is_left_behind() -> None:
    scheduler = decoding(7, max_in_flight=3)
    flying = drain_slots(scheduler)
    for _ in range(30):
        complete(scheduler, flying.pop(0))
        flying += drain_slots(scheduler)
        out = [row.sequence.sequence_id for step in flying for row in step.rows]
        assert sorted(out) == list(range(7))


def test_a_prompt_alone_is_cut_into_equal_chunks_that_fly_together() -> None:
    scheduler = make_scheduler(max_in_flight=4, max_step_tokens=64)
    scheduler.add(make_sequence(1, num_prompt=100))
    steps = drain_slots(scheduler)
    assert [shape(step) for step in steps] == [[(1, 0, 25)], [(1, 25, 25)], [(1, 50, 25)], [(1, 75, 25)]]
    assert [step.rows[0].wants_output for step in steps] == [False, False, False, True]
    assert [row.token_ids for step in steps[1:2] for row in step.rows] == [tuple(range(125, 150))]
    assert [len(step.rows[0].block_table) for step in steps] == [7, 13, 19, 25]
    assert steps[3].rows[0].needs_registration


def test_chunks_respect_max_step_tokens_and_the_minimum() -> None:
    scheduler = make_scheduler(max_in_flight=2, max_step_tokens=16, min_prefill_tokens=12)
    scheduler.add(make_sequence(1, num_prompt=70))
    assert [step.num_tokens for step in drain_slots(scheduler)] == [16, 16]
    scheduler = make_scheduler(max_in_flight=4, max_step_tokens=16, min_prefill_tokens=12)
    scheduler.add(make_sequence(1, num_prompt=20))
    assert [step.num_tokens for step in drain_slots(scheduler)] == [12, 8]


def test_decodes_go_first_and_prefill_fills_the_rest() -> None:
    scheduler = decoding(3, max_step_tokens=10)
    scheduler.add(make_sequence(10, num_prompt=1))
    scheduler.add(make_sequence(11, num_prompt=20))
    step = scheduler.schedule()
    assert step is not None
    assert shape(step) == [(0, 3, 1), (1, 3, 1), (2, 3, 1), (10, 0, 1), (11, 0, 6)]


def test_one_token_prompts_stand_before_longer_chunks() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, num_prompt=5))
    scheduler.add(make_sequence(2, num_prompt=1))
    step = scheduler.schedule()
    assert step is not None
    assert shape(step) == [(2, 0, 1), (1, 0, 5)]


def test_branches_are_spread_over_the_stages() -> None:
    scheduler = make_scheduler(max_in_flight=2, num_stages=2, min_prefill_tokens=64)
    branches = tuple((1, 2, 3) for _ in range(4))
    branching = {"score_from": 3, "forced_token_id": 9, "branch_start": 3, "next_branches": branches}
    for sequence_id in range(5):
        scheduler.add(make_sequence(sequence_id, 5, max_tokens=1, **branching))
    for step in drain_slots(scheduler):  # the context, with the first branch of each
        complete(scheduler, step)
    steps = drain_slots(scheduler)
    assert [len(step.rows) for step in steps] == [3, 2]
    while steps:  # and so they go on: one returns, its sequences are in the next
        complete(scheduler, steps.pop(0))
        steps += drain_slots(scheduler)
        assert all(len(step.rows) <= 3 for step in steps)
    assert not scheduler.num_running


def test_priority_goes_first_then_arrival_but_only_so_far() -> None:
    scheduler = make_scheduler(max_step_tokens=3, max_waiting_sequences=5000)
    scheduler.add(make_sequence(0))
    scheduler.add(make_sequence(1))
    scheduler.add(make_sequence(2, priority=1))
    served = []
    for sequence_id in range(3, 3000):  # a flood of urgent ones
        scheduler.add(make_sequence(sequence_id, priority=1, max_tokens=1))
        step = scheduler.schedule()
        assert step is not None
        served += [row.sequence.sequence_id for row in step.rows if row.start == 0]
        complete(scheduler, step)
        if 2 in served:
            scheduler.finish(2)
    assert served[:3] == [2, 3, 4]
    assert 1000 < served.index(0) < 1030


def test_resumed_tokens_are_computed_but_not_chosen_again() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1, num_prompt=3, max_tokens=4, output_token_ids=[50, 51])
    scheduler.add(sequence)
    step = scheduler.schedule()
    assert step is not None
    (row,) = step.rows
    assert row.token_ids == (100, 101, 102, 50, 51)
    assert (row.output_position, row.needs_registration) == (2, True)
    complete(scheduler, step, token=52)
    step = scheduler.schedule()
    assert step is not None
    assert (step.rows[0].token_ids, step.rows[0].output_position, step.rows[0].needs_registration) == ((52,), 3, False)
    complete(scheduler, step, token=53)
    assert sequence.output_token_ids == [50, 51, 52, 53]
    assert sequence.finished
    assert scheduler.schedule() is None
    assert scheduler.num_free_blocks == 1000


def test_the_last_token_needs_no_slot() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_sequence(1, num_prompt=4, max_tokens=5))  # 9 tokens, 8 of them computed
    for _ in range(5):
        step = scheduler.schedule()
        assert step is not None
        complete(scheduler, step)
    assert scheduler.num_running == 0
    with pytest.raises(InvalidArgumentError, match="10 tokens, but the pipeline has KV cache for 8") as error:
        scheduler.add(make_sequence(2, num_prompt=4, max_tokens=6))
    assert error.value.reason == "KV_CACHE_TOO_SMALL"
    assert scheduler.num_waiting == 0


def test_a_full_queue_refuses() -> None:
    scheduler = make_scheduler(max_waiting_sequences=2)
    scheduler.add(make_sequence(1))
    scheduler.add(make_sequence(2))
    with pytest.raises(ResourceExhaustedError, match="2 sequences are waiting") as error:
        scheduler.add(make_sequence(3))
    assert error.value.reason == "QUEUE_FULL"
    assert scheduler.finish(1)
    scheduler.add(make_sequence(3))


def test_the_youngest_is_preempted_computed_again_and_registered_again() -> None:
    scheduler = make_scheduler(num_blocks=5)
    old, young = make_sequence(1, num_prompt=4, max_tokens=14), make_sequence(2, num_prompt=4, max_tokens=14)
    scheduler.add(old)
    scheduler.add(young)
    step = None
    while scheduler.num_preemptions == 0:
        step = scheduler.schedule()
        assert step is not None
        assert young.finished is False
        last, released = shape(step), step.released_sequence_ids
        complete(scheduler, step)
    assert released == (2,)
    assert [entry[0] for entry in last] == [1]
    assert scheduler.num_waiting == 1
    num_output = len(young.output_token_ids)
    while scheduler.num_waiting:
        step = scheduler.schedule()
        assert step is not None
        complete(scheduler, step)
    assert old.finished
    assert step is not None
    (row,) = step.rows
    assert (row.start, row.num_tokens, row.output_position) == (0, 4 + num_output, num_output)
    assert row.needs_registration
    assert scheduler.num_preemptions == 1


def test_a_sequence_in_flight_is_not_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=2, max_step_tokens=8)
    scheduler.add(make_sequence(1, num_prompt=7, max_tokens=8))
    scheduler.add(make_sequence(2, num_prompt=3, max_tokens=8))
    flying = drain_slots(scheduler)
    while scheduler.num_preemptions == 0:
        complete(scheduler, flying.pop(0))
        before = {row.sequence.sequence_id for step in flying for row in step.rows}
        flying += drain_slots(scheduler)
        if scheduler.num_preemptions:
            assert 2 not in before


def test_blocks_of_a_cancelled_sequence_rest_while_it_is_in_flight() -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=2, max_step_tokens=8)
    scheduler.add(make_sequence(1, num_prompt=15, max_tokens=2))
    first, second = drain_slots(scheduler)
    assert scheduler.cancel(1)
    assert not scheduler.cancel(1)
    scheduler.add(make_sequence(2, num_prompt=3, max_tokens=2))
    assert scheduler.num_free_blocks == 0
    complete(scheduler, first)
    assert scheduler.schedule() is None, "the second micro-batch still writes into the blocks"
    complete(scheduler, second)
    assert scheduler.num_free_blocks == 4
    step = scheduler.schedule()
    assert step is not None
    assert step.released_sequence_ids == (1,)
    assert shape(step) == [(2, 0, 2)]


def test_a_failed_step_ends_its_sequences_only() -> None:
    scheduler = decoding(4, max_in_flight=2)
    first, second = drain_slots(scheduler)
    failed = scheduler.fail(first.step_id)
    check_integrity(scheduler)
    assert [sequence.sequence_id for sequence in failed] == [0, 1]
    assert all(sequence.finished for sequence in failed)
    complete(scheduler, second)
    step = scheduler.schedule()
    assert step is not None
    assert step.released_sequence_ids == (0, 1)
    assert [row.sequence.sequence_id for row in step.rows] == [2]


def test_a_release_lost_with_its_step_is_sent_again() -> None:
    scheduler = decoding(3, max_in_flight=1)
    scheduler.finish(0)
    step = scheduler.schedule()
    assert step is not None
    assert step.released_sequence_ids == (0,)
    scheduler.fail(step.step_id)
    scheduler.add(make_sequence(5))
    step = scheduler.schedule()
    assert step is not None
    assert sorted(step.released_sequence_ids) == [0, 1, 2]


def test_a_lost_release_is_not_sent_again_once_the_sequence_is_registered_again() -> None:
    scheduler = make_scheduler(num_blocks=6, min_prefill_tokens=64)
    for sequence_id, num_prompt in enumerate([4, 7, 3]):
        scheduler.add(make_sequence(sequence_id, num_prompt, max_tokens=12))
    for _ in range(5):
        step = scheduler.schedule()
        assert step is not None
        complete(scheduler, step)
    scheduler.max_in_flight = scheduler.num_stages = 3
    preempting = scheduler.schedule()
    assert preempting is not None
    assert preempting.released_sequence_ids == (2,)
    scheduler.finish(1)
    again = scheduler.schedule()
    assert again is not None
    assert [(row.sequence.sequence_id, row.needs_registration) for row in again.rows] == [(2, True)]
    scheduler.fail(preempting.step_id)
    check_integrity(scheduler)
    complete(scheduler, again)
    step = scheduler.schedule()
    assert step is not None
    assert step.released_sequence_ids == (0,)


def test_steps_return_in_order() -> None:
    scheduler = decoding(2, max_in_flight=2)
    drain_slots(scheduler)
    with pytest.raises(AssertionError, match="step 3 returned before step 2"):
        scheduler.complete(3, {})


def test_a_new_epoch_computes_everything_again_in_the_old_order() -> None:
    scheduler = decoding(3, max_in_flight=2)
    scheduler.add(make_sequence(3, num_prompt=80, max_tokens=8))
    scheduler.schedule()
    assert scheduler.reset(num_blocks=22) == ()
    check_integrity(scheduler)
    assert (scheduler.num_in_flight, scheduler.num_running, scheduler.num_waiting) == (0, 0, 4)
    scheduler.max_in_flight = 1
    step = scheduler.schedule()
    assert step is not None
    assert step.step_id == 1
    assert shape(step) == [(0, 0, 4), (1, 0, 4), (2, 0, 4)], "the fourth does not fit beside them"
    assert all(row.needs_registration for row in step.rows)


def test_a_new_epoch_and_another_pipeline_compute_the_shortest_first() -> None:
    scheduler = make_scheduler(max_in_flight=1)
    lengths = {0: 40, 1: 8, 2: 24, 3: 8}
    for sequence_id, num_prompt in lengths.items():
        scheduler.add(make_sequence(sequence_id, num_prompt=num_prompt))
    complete(scheduler, scheduler.schedule() or pytest.fail("nothing to do"))
    scheduler.reset(num_blocks=1000)
    scheduler.add(make_sequence(4, num_prompt=16, resumed=True))  # it comes from a pipeline that was lost
    scheduler.add(make_sequence(5, num_prompt=3))
    step = scheduler.schedule()
    assert step is not None
    assert [row.sequence.sequence_id for row in step.rows] == [1, 3, 4, 2, 0, 5], "those that never ran come last"


def test_a_new_epoch_releases_nothing_of_the_old_one() -> None:
    scheduler = decoding(2)
    scheduler.finish(0)
    scheduler.reset(num_blocks=100)
    step = scheduler.schedule()
    assert step is not None
    assert step.released_sequence_ids == ()


def test_admission_leaves_one_free_block_for_each_running_sequence() -> None:
    scheduler = make_scheduler(num_blocks=13)
    for sequence_id in range(10):
        scheduler.add(make_sequence(sequence_id))
    step = scheduler.schedule()
    assert step is not None
    assert len(step.rows) == 7  # the seventh leaves 6 blocks for the 6 before it
    assert scheduler.num_free_blocks == 6


def test_sequences_too_long_for_the_new_epoch_are_handed_back() -> None:
    scheduler = decoding(1)
    long = make_sequence(5, num_prompt=200)
    scheduler.add(long)
    assert scheduler.reset(num_blocks=20) == (long,)
    assert long.finished
    check_integrity(scheduler)
    assert scheduler.num_waiting == 1
