"""When a gateway may say that other gateways have everything."""

from __future__ import annotations

from gateway.engine.ownership import Ownership


def test_only_what_is_owned_for_longer_than_a_lease_counts() -> None:
    """A gateway that died still holds its leases; whoever comes next waits for them to run out."""
    ownership = Ownership(lease_s=10.0)
    ownership.saw("a", taken=True, now_s=100.0)
    ownership.saw("a", taken=True, now_s=109.0)  # since 100
    assert not ownership.all_taken({"a"}, 110.0)
    assert ownership.all_taken({"a"}, 110.1)


def test_one_stage_that_may_be_had_is_enough_to_wait_for() -> None:
    ownership = Ownership(lease_s=1.0)
    ownership.saw("a", taken=True, now_s=0.0)
    assert not ownership.all_taken({"a", "never asked"}, 5.0)
    ownership.saw("b", taken=True, now_s=0.0)
    assert ownership.all_taken({"a", "b"}, 5.0)
    ownership.saw("b", taken=False, now_s=5.0)
    assert not ownership.all_taken({"a", "b"}, 50.0)
    ownership.saw("b", taken=True, now_s=50.0)
    assert not ownership.all_taken({"a", "b"}, 50.5)


def test_no_stage_at_all_is_not_taken_and_what_is_gone_is_forgotten() -> None:
    ownership = Ownership(lease_s=1.0)
    assert not ownership.all_taken(set(), 5.0)
    ownership.saw("a", taken=True, now_s=0.0)
    ownership.forget_all_but(set())
    assert not ownership.all_taken({"a"}, 5.0)
