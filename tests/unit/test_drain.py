"""What a pipeline does when a stage of it is about to stop, and which of its sequences stay."""

from __future__ import annotations

import pytest

from gateway.engine.drain import Action, Pace, Remainder, Situation, choose, reopen_wait_s, stays

HERE = Pace(token_s=0.05, prefill_token_s=0.001)
UNKNOWN = Pace(token_s=None, prefill_token_s=None)


def situation(**changes) -> Situation:
    plain = {"remaining_s": 10.0, "num_sequences": 4, "replaced": False, "others_ready": False, "mends_another": False}
    return Situation(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({}, Action.GO_ON),  # one pipeline: it serves until the stage stops
        ({"remaining_s": 0.0}, Action.GO_ON),
        ({"num_sequences": 0}, Action.END),  # the sooner it goes the sooner it is replaced
        ({"others_ready": True}, Action.MOVE),
        ({"others_ready": True, "num_sequences": 0}, Action.END),
        ({"replaced": True}, Action.REOPEN),
        ({"replaced": True, "others_ready": True}, Action.REOPEN),  # keeps both pipelines busy
        ({"replaced": True, "num_sequences": 0}, Action.REOPEN),
        ({"replaced": True, "wait_s": 0.3}, Action.GO_ON),
        ({"mends_another": True}, Action.MERGE),
        ({"mends_another": True, "others_ready": True}, Action.MOVE),
        ({"mends_another": True, "replaced": True}, Action.REOPEN),
    ],
)
def test_what_a_pipeline_does(changes: dict, action: Action) -> None:
    assert choose(situation(**changes)) is action


@pytest.mark.parametrize(
    ("left", "tokens", "begun", "remaining_s", "there", "expected"),
    [
        (10, 1000, True, 10.0, HERE, True),  # 0.5 s here, 1.5 s there
        (10, 1000, False, 10.0, HERE, False),  # nothing is lost by going
        (None, 1000, True, 10.0, HERE, False),  # nobody knows how long it takes
        (200, 1000, True, 10.0, HERE, False),  # 10 s: the stage stops before
        (100, 1000, True, 10.0, HERE, True),
        (100, 1000, True, 7.9, HERE, False),  # in time if nothing is slower than it seems
        (1, 1000, True, 0.5, HERE, False),
        (100, 10, True, 10.0, Pace(token_s=0.01, prefill_token_s=0.001), False),  # there it is quicker
        (100, 10, True, 10.0, Pace(token_s=0.01, prefill_token_s=0.001, backlog_tokens=9000), True),
        (100, 10, True, 10.0, UNKNOWN, True),
    ],
)
def test_which_sequences_stay(left, tokens, begun, remaining_s, there, expected) -> None:
    sequence = Remainder(left_tokens=left, num_tokens=tokens, begun=begun)
    assert stays(sequence, remaining_s=remaining_s, here=HERE, there=there) is expected


def test_without_a_measured_pace_nothing_stays() -> None:
    sequence = Remainder(left_tokens=1, num_tokens=10, begun=True)
    assert not stays(sequence, remaining_s=100, here=UNKNOWN, there=HERE)


@pytest.mark.parametrize(
    ("running", "remaining_s", "wait_s"),
    [
        ([], 10.0, 0.0),
        ([(10, 1000)], 10.0, 0.5),  # 0.5 s to its end, 1 s to compute it again
        ([(10, 100)], 10.0, 0.0),  # 0.5 s and 0.1 s
        ([(10, 100), (10, 1000)], 10.0, 0.5),
        ([(10, 100), (None, 1000)], 10.0, 0.0),
        ([(10, 1000)], 1.0, 0.0),  # not in time
    ],
)
def test_a_replacement_waits_only_where_that_is_quicker(running, remaining_s, wait_s) -> None:
    sequences = [Remainder(left_tokens=left, num_tokens=tokens, begun=True) for left, tokens in running]
    waiting = Remainder(left_tokens=9999, num_tokens=9999, begun=False)
    assert reopen_wait_s([*sequences, waiting], remaining_s=remaining_s, here=HERE) == wait_s
