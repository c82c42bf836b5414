"""Penalty histories: a step run again changes nothing, and a registration equals counting step by step."""

import numpy as np
import pytest

from gateway.sampling import make_sampling
from gateway.types import SamplingParams
from stageline.errors import FailedPreconditionError, InternalError
from stages.logits.history import PenaltyHistory


def row(history, tokens, context_len, registration=None):
    sampling = make_sampling(SamplingParams(), choice_index=0, output_position=0, registration=registration)
    history.update(1, np.array(tokens, np.int32), context_len, sampling)


def state(history):
    ids, counts = history.counts(1)
    return history.seen(1).tolist(), dict(zip(ids.tolist(), counts.tolist(), strict=True))


def test_steps_run_again_and_registration_equal_counting():
    history = PenaltyHistory()
    for _ in range(2):
        row(history, (3, 5), 2, ((3, 5), ()))
    for context_len, token in ((3, 9), (3, 9), (4, 9), (4, 9), (5, 5)):
        row(history, (token,), context_len)
    registered = PenaltyHistory()
    row(registered, (5,), 5, ((3, 5), (9, 9, 5)))
    assert state(history) == state(registered) == ([3, 5, 9], {9: 2.0, 5: 1.0})


def test_unregistered_and_released_sequences_are_refused():
    history = PenaltyHistory()
    row(history, (3,), 1, ((3,), ()))
    history.release([1])
    with pytest.raises(FailedPreconditionError, match="no history"):
        row(history, (9,), 2)


def test_a_gap_is_an_error_and_changes_nothing():
    history = PenaltyHistory()
    row(history, (3, 5), 2, ((3, 5), ()))
    with pytest.raises(InternalError, match="holds 2 tokens, but the row follows 3") as caught:
        row(history, (9,), 4)
    assert caught.value.reason == "HISTORY_GAP"
    assert state(history) == ([3, 5], {})
    row(history, (9, 9), 4)
    row(history, (5, 9, 9, 5), 5)  # overlaps what was counted
    assert state(history) == ([3, 5, 9], {5: 1.0, 9: 2.0})
    with pytest.raises(InternalError, match="holds 3 tokens"):
        row(history, (1,), 9, ((3, 5), (9,)))
