"""Waits between tries of the client."""

import pytest

from stageline.client.backoff import Backoff

BACKOFF = Backoff(initial_s=0.1, max_s=1.0)


@pytest.mark.parametrize(("attempt", "ceiling_s"), [(0, 0.1), (1, 0.2), (3, 0.8), (4, 1.0), (100_000, 1.0)])
def test_the_jitter_is_full_and_its_ceiling_doubles_up_to_the_maximum(attempt, ceiling_s):
    assert BACKOFF.delay_s(attempt, 0.0) == 0.0
    assert BACKOFF.delay_s(attempt, 0.5) == pytest.approx(ceiling_s / 2)


def test_what_the_server_asks_for_is_waited_in_full():
    assert BACKOFF.delay_s(0, 0.0, retry_after_s=3.0) == 3.0
    assert BACKOFF.delay_s(0, 0.5, retry_after_s=3.0) == pytest.approx(3.05)


def test_no_wait_goes_past_the_deadline():
    assert BACKOFF.delay_s(0, 0.5, left_s=0.06) == pytest.approx(0.05)
    assert BACKOFF.delay_s(0, 0.5, left_s=0.05) is None
    assert BACKOFF.delay_s(0, 0.0, retry_after_s=3.0, left_s=2.0) is None


@pytest.mark.parametrize("wrong", [{"initial_s": 0}, {"initial_s": 9.0}, {"multiplier": 0.5}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Backoff(**wrong)
