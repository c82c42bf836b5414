"""How much work a micro-batch gets: the pure functions."""

from __future__ import annotations

import pytest

from gateway.scheduler.filling import decode_target, prefill_budget


def test_decode_target() -> None:
    assert decode_target(num_ready=10, num_decoding=10, num_groups=1, num_free_slots=1) == 10
    assert decode_target(num_ready=10, num_decoding=16, num_groups=4, num_free_slots=1) == 4
    assert decode_target(num_ready=0, num_decoding=16, num_groups=4, num_free_slots=1) == 0


@pytest.mark.parametrize(
    ("backlog", "free", "decoding_now", "room", "expected"),
    [
        (4000, 1.0, 0, 2048, 1000),  # an even share of the backlog
        (4000, 0.1, 0, 2048, 1000),  # a scarce cache does not matter while nothing decodes
        (4000, 0.1, 9, 2048, 204),  # scarce, and decodes want to end first
        (4000, 0.0, 9, 2048, 32),  # never less than the minimum
        (4000, 1.0, 9, 20, 20),  # never more than the micro-batch holds
        (90_000, 1.0, 0, 2048, 2048),
    ],
)
def test_prefill_budget(backlog: int, free: float, decoding_now: int, room: int, expected: int) -> None:
    assert expected == prefill_budget(
        backlog_tokens=backlog,
        num_chunks=4,
        free_kv_fraction=free,
        num_decoding=decoding_now,
        most_beside_decodes=None,
        room_tokens=room,
        max_step_tokens=2048,
        min_prefill_tokens=32,
    )
