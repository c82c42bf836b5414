"""Who is to blame for the death of a stage, and how often a pipeline is tried again."""

from __future__ import annotations

import pytest

from gateway.engine.poison import MAX_DELAY_S, MAX_RESTARTS, Restarts, StageProgress, judge, steps_in_doubt
from gateway.scheduler import Scheduler, Sequence


def at(executed: int, running: int = 0) -> StageProgress:
    return StageProgress(executed, running)


@pytest.mark.parametrize(
    ("progress", "doubts"),
    [
        ([None, at(4)], {0: [5, 6, 7]}),  # 4 came back from the second stage, the others may be anywhere before it
        ([None, at(4, running=5)], {0: [6, 7]}),  # the first stage was past 5
        ([None, at(7)], {0: []}),  # it was idle: nobody is to blame
        ([at(6, running=7), None], {1: [5, 6]}),  # 7 never reached it
        ([at(4, running=5), None], {1: []}),
        ([at(7), None, at(4, running=5)], {1: [6, 7]}),
        ([None, None], {0: [5, 6, 7], 1: [5, 6, 7]}),
        ([None, at(5), None], {0: [6, 7], 2: [5]}),
        ([at(7), at(7)], {}),
    ],
)
def test_steps_in_doubt(progress, doubts):
    assert steps_in_doubt(progress, [5, 6, 7]) == doubts


def sequence(sequence_id: int, **fields) -> Sequence:
    return Sequence(sequence_id=sequence_id, prompt_token_ids=(1, 2), max_total_tokens=10, **fields)


def test_two_deaths_of_one_stage_isolate_and_the_third_alone_proves_it():
    bad, good = sequence(1), sequence(2)
    assert judge({"0-4": [bad, good]}).alone == ()
    verdict = judge({"0-4": [bad]})
    assert (verdict.alone, verdict.poisonous) == ((bad,), ())
    bad.run_alone = True
    verdict = judge({"0-4": [bad]})
    assert (verdict.alone, verdict.poisonous) == ((), (bad,))
    assert good.deaths == {"0-4": 1}


def test_deaths_of_different_stages_do_not_add_up():
    innocent = sequence(1)
    for stage in ("0-4", "4-8", "8-12"):
        verdict = judge({stage: [innocent]})
        assert verdict.alone == verdict.poisonous == ()


def test_a_third_death_beside_others_fails_nobody():
    bad, good = sequence(1, run_alone=True, deaths={"0-4": 2}), sequence(2)
    verdict = judge({"0-4": [bad, good]})
    assert verdict.poisonous == ()
    assert verdict.alone == (bad,)


def test_a_token_clears_a_suspect_and_ends_its_isolation():
    scheduler = Scheduler(num_blocks=10, block_size_tokens=4)
    suspect, other = sequence(1, deaths={"0-4": 2}, run_alone=True), sequence(2)
    scheduler.add(other)
    scheduler.add(suspect)
    step = scheduler.schedule()
    assert [row.sequence for row in step.rows] == [suspect]
    scheduler.complete(step.step_id, {1: 7})
    assert suspect.deaths == {}
    step = scheduler.schedule()
    assert {row.sequence.sequence_id for row in step.rows} == {1, 2}


def test_restarts_back_off_and_are_capped_until_there_is_progress():
    restarts, delays = Restarts(), []
    for _ in range(MAX_RESTARTS):
        assert not restarts.exhausted
        restarts = restarts.after(opened=True, progressed=False)
        delays.append(restarts.delay_s)
    assert restarts.exhausted
    assert delays == sorted(delays)
    assert (delays[0], delays[1], delays[-1]) == (0.1, 0.2, MAX_DELAY_S)
    restarts = restarts.after(opened=True, progressed=True)
    assert (restarts.exhausted, restarts.delay_s) == (False, 0.1)


def test_attempts_that_opened_nothing_back_off_without_end():
    restarts = Restarts()
    for _ in range(100):
        restarts = restarts.after(opened=False, progressed=False)
    assert (restarts.exhausted, restarts.delay_s) == (False, MAX_DELAY_S)
