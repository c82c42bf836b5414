"""What is put down of a traced request: durations of each stage, brought onto the gateway's clock."""

from __future__ import annotations

import pytest

from gateway.tracing.work import RequestWork
from stageline.stage.v1 import stage_service_pb2 as pb

HOP_S, WORK_S, WAIT_S = 0.001, 0.01, 0.002
AHEAD_S = (5000.0, 200.0)  # the stages' clocks, before the gateway's


def add_step(work: RequestWork, epoch: int, sent_s: float, *, answered: bool = True) -> float:
    """One step through two stages; returns when it came back."""
    now_s, timings = sent_s, []
    for place, ahead_s in enumerate(AHEAD_S):
        received_s = now_s + HOP_S
        started_s, now_s = received_s + WAIT_S, received_s + WAIT_S + WORK_S
        times = [round((one + ahead_s) * 1e9) for one in (received_s, started_s, now_s)]
        timings.append(
            pb.StageTiming(
                stage=f"{place}-{place + 1}", received_ns=times[0], started_ns=times[1], finished_ns=times[2],
                cpu_ns=round(WORK_S / 2 * 1e9),
            )
        )  # fmt: skip
    returned_s = now_s + HOP_S
    work.add(
        "0", epoch, timings, num_tokens=2, num_step_tokens=5, answered=answered, sent_s=sent_s, returned_s=returned_s
    )
    return returned_s


def test_stages_of_other_hosts_are_on_the_gateways_clock() -> None:
    work = RequestWork()
    first_s = add_step(work, 1, 100.0, answered=False)
    second_s = add_step(work, 1, first_s)
    last_s = add_step(work, 1, second_s)
    assert (work.sent_s, work.first_token_s) == (100.0, second_s)
    first, second = work.stages()
    assert (first.layers, second.layers) == ("0-1", "1-2")
    assert first.began_s == pytest.approx(100.0 + HOP_S + WAIT_S, abs=WAIT_S)
    assert second.ended_s == pytest.approx(last_s - HOP_S, abs=WAIT_S)
    assert first.began_s < second.began_s < first.ended_s < second.ended_s < last_s
    for stage in (first, second):
        assert (stage.num_steps, stage.num_tokens, stage.num_step_tokens) == (3, 6, 15)
        assert stage.computing_s == pytest.approx(3 * WORK_S)
        assert stage.cpu_s == pytest.approx(3 * WORK_S / 2)
        assert stage.waiting_s == pytest.approx(3 * WAIT_S)


def test_every_epoch_has_its_own_stages() -> None:
    work = RequestWork()
    add_step(work, 2, add_step(work, 1, 100.0))
    assert [(stage.epoch, stage.layers) for stage in work.stages()] == [(1, "0-1"), (1, "1-2"), (2, "0-1"), (2, "1-2")]


def test_steps_without_timings_still_say_when() -> None:
    work = RequestWork()
    work.add("0", 1, [], num_tokens=1, num_step_tokens=1, answered=True, sent_s=1.0, returned_s=2.0)
    assert (work.sent_s, work.first_token_s, work.stages()) == (1.0, 2.0, [])
