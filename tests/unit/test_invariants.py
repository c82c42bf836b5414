"""What an idle engine may hold: nothing. Every kind of leak is found, and none is reported while requests are served."""

from __future__ import annotations

import pytest

from gateway.engine.invariants import EngineState, LaneState, find_leaks
from gateway.scheduler import Scheduler, Sequence


def scheduler_after_work() -> Scheduler:
    """Five sequences ran on it, one of them to its end, the others were cancelled: waiting, in flight, and ready."""
    scheduler = Scheduler(num_blocks=16, block_size_tokens=4, max_in_flight=2)
    sequences = [
        Sequence(sequence_id=i, prompt_token_ids=tuple(range(i, i + 9)), max_total_tokens=14, request_key=i)
        for i in range(5)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.cancel(4)
    while scheduler.num_running or scheduler.num_waiting:
        step = scheduler.schedule()
        assert step is not None
        scheduler.cancel(step.step_id)  # 1, 2 and 3, in flight
        scheduler.complete(step.step_id, {r.sequence.sequence_id: 7 for r in step.rows if r.wants_output})
    return scheduler


def state(lane_changes: dict[str, object] | None = None, **changes) -> EngineState:
    lane = {"name": "0", "num_choices": 0, "num_probes": 0, "num_sent": 0, "num_held": 0}
    lane = LaneState(**{**lane, "scheduler": scheduler_after_work(), **(lane_changes or {})})
    idle = {"num_open": 0, "num_unplaced": 0, "unplaced_tokens": 0, "num_pipelines": 1, "num_chains": 1}
    return EngineState(**{**idle, "lanes": (lane,), **changes})


def test_an_idle_engine_holds_nothing():
    assert find_leaks(state()) == ()


@pytest.mark.parametrize(
    ("lane_changes", "changes", "leak"),
    [
        ({}, {"num_unplaced": 1, "unplaced_tokens": 5}, "1 requests of 5 tokens wait"),
        ({}, {"num_pipelines": 2}, "2 pipelines hold leases"),
        ({"num_choices": 2, "num_probes": 1}, {}, "1 sequences of no request"),
        ({"num_sent": 3}, {}, "3 steps are out"),
        ({"num_held": 1}, {}, "1 steps wait for masks"),
    ],
)
def test_what_is_left_is_found(lane_changes, changes, leak):
    (found,) = find_leaks(state(lane_changes, **changes))
    assert leak in found
    assert find_leaks(state(lane_changes, **changes, num_open=1)) == (), "somebody is served: it may belong to them"


def test_blocks_and_queue_entries_that_are_left_are_found():
    scheduler = scheduler_after_work()
    scheduler._pool.allocate(3)
    assert any("3 KV blocks are not free" in leak for leak in find_leaks(state({"scheduler": scheduler})))
    scheduler = scheduler_after_work()
    scheduler.add(Sequence(sequence_id=9, prompt_token_ids=(1, 2), max_total_tokens=5))
    assert any("1 queue entries" in leak for leak in find_leaks(state({"scheduler": scheduler})))
    scheduler.schedule()
    assert find_leaks(state({"scheduler": scheduler})) == (), "in flight: its return gives the blocks back"


def test_wrong_books_are_found():
    scheduler = scheduler_after_work()
    scheduler._being_filled[b"key"] = 1  # a prompt would wait for ever for what nobody computes
    assert any("books are wrong" in leak for leak in find_leaks(state({"scheduler": scheduler})))


def test_a_canary_is_not_a_leak():
    assert find_leaks(state({"num_choices": 1, "num_probes": 1})) == ()
