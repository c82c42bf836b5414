"""More work than the pipeline can take: bounds, fair shares, priorities, deadlines, one request against all others."""

from __future__ import annotations

import pytest

from gateway.scheduler import PROBE_PRIORITY, Scheduler, SchedulerLimits, Sequence, check_integrity
from gateway.scheduler.drain_rate import DrainRate
from gateway.scheduler.fair_share import PRUNE_ABOVE, VirtualTokenCounters
from stageline.errors import ResourceExhaustedError


def make_scheduler(num_blocks: int = 100, **limits) -> Scheduler:
    limits = SchedulerLimits(**{"max_step_tokens": 64, "max_step_sequences": 8, **limits})
    return Scheduler(num_blocks=num_blocks, block_size_tokens=4, limits=limits)


def make_sequence(sequence_id: int, num_prompt: int = 8, max_tokens: int = 4, **fields) -> Sequence:
    prompt = tuple(range(1000 * sequence_id, 1000 * sequence_id + num_prompt))
    return Sequence(
        sequence_id=sequence_id, prompt_token_ids=prompt, max_total_tokens=num_prompt + max_tokens, **fields
    )


def run_step(scheduler: Scheduler) -> list[int]:
    """Ids of the sequences in the next step, which returns at once."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.complete(step.step_id, {row.sequence.sequence_id: 1 for row in step.rows if row.wants_output})
    check_integrity(scheduler)
    return [row.sequence.sequence_id for row in step.rows]


def test_a_tenant_that_floods_the_queue_gets_its_share_and_no_more() -> None:
    scheduler = make_scheduler(max_step_sequences=4)
    for sequence_id in range(200):
        scheduler.add(make_sequence(sequence_id, tenant="flood"))
    for _ in range(10):
        run_step(scheduler)
    for sequence_id in range(1000, 1020):
        scheduler.add(make_sequence(sequence_id, tenant="late"))
    served = {"flood": 0, "late": 0}
    while any(sequence.tenant == "late" for sequence in scheduler._waiting):
        for sequence_id in run_step(scheduler):
            served["late" if sequence_id >= 1000 else "flood"] += 1
    assert 0.8 <= served["late"] / served["flood"] <= 1.25, "both wait, so both get half"


def test_shares_are_of_tokens_not_of_requests() -> None:
    scheduler = make_scheduler(num_blocks=1000, max_step_sequences=2)
    for sequence_id in range(300):
        scheduler.add(make_sequence(sequence_id, num_prompt=4, max_tokens=4, tenant="short"))
        scheduler.add(make_sequence(1000 + sequence_id, num_prompt=40, max_tokens=4, tenant="long"))
    admitted = {"short": 0, "long": 0}
    before = {id(sequence) for sequence in scheduler._waiting}
    for _ in range(300):
        run_step(scheduler)
    after = {id(sequence) for sequence in scheduler._waiting}
    assert before >= after
    for tenant in admitted:
        admitted[tenant] = 300 - sum(sequence.tenant == tenant for sequence in scheduler._waiting)
    cost = {"short": 4 + 2 * 4, "long": 40 + 2 * 4}
    assert admitted["short"] * cost["short"] == pytest.approx(admitted["long"] * cost["long"], rel=0.15)


def test_a_pause_earns_no_credit() -> None:
    counters = VirtualTokenCounters()
    counters.activate("busy", ())
    counters.charge("busy", prompt_tokens=1000, output_tokens=100)
    counters.activate("idle", ("busy",))
    assert counters.of("idle") == counters.of("busy") == 1200
    counters.charge("idle", prompt_tokens=300)
    counters.leave("idle")
    counters.leave("busy")
    counters.activate("new", ())
    assert counters.of("new") == 1200, "that of the last who left"


def test_counters_of_tenants_that_are_gone_are_forgotten() -> None:
    counters = VirtualTokenCounters()
    for number in range(10 * PRUNE_ABOVE):
        counters.activate(str(number), ())
        counters.charge(str(number), prompt_tokens=1)
        counters.leave(str(number))
    assert len(counters._counters) <= PRUNE_ABOVE + 1


def test_priority_goes_before_shares() -> None:
    scheduler = make_scheduler(max_step_sequences=1)
    for sequence_id in range(3):
        scheduler.add(make_sequence(sequence_id, tenant="a", max_tokens=1))
    scheduler.add(make_sequence(3, tenant="b", priority=-1, max_tokens=1))
    scheduler.add(make_sequence(4, tenant="a", priority=1, max_tokens=1))
    assert [run_step(scheduler)[0] for _ in range(5)] == [4, 0, 1, 2, 3]


def test_sequences_that_ran_go_before_those_that_never_did() -> None:
    scheduler = make_scheduler(max_step_sequences=2)
    for sequence_id in range(6):
        scheduler.add(make_sequence(sequence_id, tenant=str(sequence_id % 3)))
    assert sorted(run_step(scheduler)) == [0, 1]
    scheduler.reset(100)
    assert sorted(run_step(scheduler)) == [0, 1]


def test_the_queue_is_bounded_by_tokens_too_but_never_refuses_the_only_one() -> None:
    scheduler = make_scheduler(max_waiting_tokens=50)
    scheduler.add(make_sequence(1, num_prompt=300))
    with pytest.raises(ResourceExhaustedError, match="300 tokens are waiting already") as error:
        scheduler.add(make_sequence(2, num_prompt=1))
    assert (error.value.reason, error.value.metadata["unit"]) == ("QUEUE_FULL", "tokens")
    scheduler.add(make_sequence(3), bounded=False)
    assert scheduler.num_waiting == 2


def test_who_is_refused_hears_when_the_queue_will_have_moved() -> None:
    scheduler = make_scheduler(max_waiting_sequences=20, max_step_sequences=1)
    for sequence_id in range(20):
        scheduler.add(make_sequence(sequence_id, max_tokens=1))
    for second in range(10):  # a request of 8 tokens a second
        scheduler.expire(float(second))
        run_step(scheduler)
    for sequence_id in range(100, 110):
        scheduler.add(make_sequence(sequence_id))
    with pytest.raises(ResourceExhaustedError) as error:
        scheduler.add(make_sequence(200))
    assert float(error.value.metadata["retry_after_s"]) == pytest.approx(20, rel=0.2)


def test_drain_rate() -> None:
    rate = DrainRate()
    assert rate.retry_after_s(100, now_s=5.0) == 1.0
    for second in range(6, 60):
        rate.observe(50, float(second))
    assert rate.retry_after_s(100, now_s=59.0) == pytest.approx(2.0, rel=0.1)
    assert rate.retry_after_s(10**9, now_s=59.0) == 60.0
    assert rate.retry_after_s(0, now_s=59.0) == 0.1
    assert rate.retry_after_s(100, now_s=100.0) > 10, "nothing left the queue for a long time"


def test_expired_sequences_cost_nothing_any_more() -> None:
    scheduler = make_scheduler()
    soon, late, never = make_sequence(1, deadline_s=5.0), make_sequence(2, deadline_s=50.0), make_sequence(3)
    for sequence in (soon, late, never):
        scheduler.add(sequence)
    assert scheduler.expire(4.9) == ()
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.expire(5.0) == (soon,)
    scheduler.complete(step.step_id, {2: 1, 3: 1})
    check_integrity(scheduler)
    assert run_step(scheduler) == [2, 3]
    assert scheduler.expire(5.0) == ()


def test_deadlines_of_sequences_that_ended_are_forgotten() -> None:
    scheduler = make_scheduler()
    for sequence_id in range(1000):
        scheduler.add(make_sequence(sequence_id, deadline_s=1e9))
        scheduler.finish(sequence_id)
    assert len(scheduler._deadlines) < 100


def test_choices_of_one_request_leave_room_for_others() -> None:
    scheduler = make_scheduler(num_blocks=40, max_request_kv_fraction=0.5, prefix_caching=False)
    for sequence_id in range(8):
        scheduler.add(make_sequence(sequence_id, num_prompt=16, max_tokens=20, request_key=1))
    scheduler.add(make_sequence(20, num_prompt=16, max_tokens=20, request_key=2))
    admitted = set(run_step(scheduler)) | set(run_step(scheduler))
    assert 20 in admitted
    assert sum(len(sequence.block_table) for sequence in scheduler._by_request[1].values()) <= 20


def test_a_request_alone_may_have_everything() -> None:
    scheduler = make_scheduler(num_blocks=40, max_request_kv_fraction=0.1, prefix_caching=False)
    for sequence_id in range(8):
        scheduler.add(make_sequence(sequence_id, num_prompt=16, max_tokens=4, request_key=1))
    assert len(set(run_step(scheduler)) | set(run_step(scheduler))) > 5


def test_a_sequence_over_its_share_waits_for_blocks_instead_of_taking_them() -> None:
    scheduler = make_scheduler(num_blocks=12, max_request_kv_fraction=0.5, prefix_caching=False)
    giant, other = make_sequence(1, num_prompt=30, max_tokens=14), make_sequence(2, num_prompt=8, max_tokens=8)
    scheduler.add(giant)
    scheduler.add(other)
    while not other.finished:
        run_step(scheduler)
        assert scheduler.num_preemptions == 0
    while not giant.finished:
        run_step(scheduler)


def test_a_sequence_runs_alone_until_its_next_token_and_probes_go_before_it() -> None:
    scheduler = make_scheduler()
    for sequence_id in range(4):
        scheduler.add(make_sequence(sequence_id))
    run_step(scheduler)
    scheduler.run_alone(2)
    scheduler.add(make_sequence(9, num_prompt=1, max_tokens=1, priority=PROBE_PRIORITY))
    assert run_step(scheduler) == [9]
    assert run_step(scheduler) == [2]
    assert sorted(run_step(scheduler)) == [0, 1, 2, 3]
