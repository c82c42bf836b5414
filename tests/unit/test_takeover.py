"""Where the sequences of a lost pipeline go on, and what is known of how long its replacement takes."""

from __future__ import annotations

import random

import pytest

from gateway.engine.drain import DOUBT, Pace, Remainder
from gateway.engine.takeover import MIN_GAIN_S, MOST_ATTEMPTS, PACED, Standing, TakeoverTimes, places

HERE = Pace(token_s=0.05, prefill_token_s=0.001)
UNKNOWN = Pace(token_s=None, prefill_token_s=None)


def one(num_tokens: int = 1000, *, begun: bool = True, suspected: bool = False) -> Remainder:
    return Remainder(left_tokens=100, num_tokens=num_tokens, begun=begun, suspected=suspected)


def other(*, pace: Pace = HERE, backlog: int = 0, load: int = 0, room: int = 10**6) -> Standing:
    with_backlog = Pace(token_s=pace.token_s, prefill_token_s=pace.prefill_token_s, backlog_tokens=backlog)
    return Standing(pace=with_backlog, num_sequences=load, room_tokens=room)


@pytest.mark.parametrize(
    ("ready_in_s", "there", "moves"),
    [
        (None, other(), True),  # nobody knows when a replica comes
        (None, other(backlog=10**6, room=0), True),
        (60.0, other(), True),  # 1 s there, 61 s here
        (60.0, other(load=8), True),
        (60.0, other(backlog=100_000), False),  # 101 s there
        (60.0, other(room=999), False),  # nobody knows when there is room
        (60.0, other(room=1000), True),
        (0.2, other(), False),  # a hot spare: 1.2 s here, 1 s there
        (0.2, other(load=8), False),
        (1.9, other(), False),  # 2.9 s and 1 s
        (2.1, other(), True),  # 3.1 s and 1 s
        (2.1, other(load=1), False),  # 3.1 s and 1.74 s, beside others
        (60.0, other(pace=UNKNOWN), True),  # taken to be as quick
        (60.0, other(pace=Pace(token_s=None, prefill_token_s=0.5)), True),  # all it knows is what a canary took
    ],
)
def test_a_sequence_moves_where_that_is_clearly_quicker(ready_in_s, there, moves) -> None:
    assert places([one()], ready_in_s=ready_in_s, here=HERE, others=[there]) == [0 if moves else None]


def test_without_another_pipeline_all_wait() -> None:
    assert places([one(), one()], ready_in_s=None, here=HERE, others=[]) == [None, None]


def test_without_a_measured_pace_they_move_only_where_nobody_knows_how_long_to_wait() -> None:
    assert places([one()], ready_in_s=60.0, here=UNKNOWN, others=[other(pace=UNKNOWN)]) == [None]
    assert places([one()], ready_in_s=None, here=UNKNOWN, others=[other(pace=UNKNOWN)]) == [0]


def test_a_full_cache_is_computed_again_on_both() -> None:
    """51 s on the replacement alone; with half of it on each, half of that."""
    chosen = places([one(2000)] * 25, ready_in_s=1.0, here=HERE, others=[other()])
    assert 8 <= chosen.count(0) <= 12
    assert chosen.count(0) + chosen.count(None) == 25


def test_the_shortest_stay_with_a_hot_spare_and_go_where_there_is_none() -> None:
    assert places([one(9000), one(100)], ready_in_s=0.1, here=HERE, others=[other(load=1)]) == [None, None]
    sizes = [one(4000), one(1000), one(3000, begun=False)]
    assert places(sizes, ready_in_s=60.0, here=HERE, others=[other(room=5000)]) == [0, 0, None]


def test_several_pipelines_share_what_moves() -> None:
    chosen = places([one()] * 6, ready_in_s=None, here=HERE, others=[other(), other(backlog=2500), other()])
    assert [chosen.count(place) for place in range(3)] == [3, 0, 3]
    spread = places([one()] * 6, ready_in_s=None, here=UNKNOWN, others=[other(pace=UNKNOWN)] * 3)
    assert [spread.count(place) for place in range(3)] == [2, 2, 2]


def test_a_suspect_takes_no_other_pipeline_down_while_it_can_wait() -> None:
    both = [one(suspected=True), one()]
    assert places(both, ready_in_s=60.0, here=HERE, others=[other()]) == [None, 0]
    assert places(both, ready_in_s=None, here=HERE, others=[other()]) == [0, 0]


def test_nothing_goes_where_it_resumes_later_than_it_would_have() -> None:
    rng = random.Random(4)
    for _ in range(300):
        sequences = [one(rng.randrange(1, 5000)) for _ in range(rng.randrange(1, 12))]
        others = [
            other(backlog=rng.randrange(9000), load=rng.randrange(3), room=rng.randrange(20_000)) for _ in range(2)
        ]
        ready_in_s = rng.uniform(0, 20)
        chosen = places(sequences, ready_in_s=ready_in_s, here=HERE, others=others)
        given, here_tokens = [0, 0], 0
        for place, sequence in sorted(zip(chosen, sequences, strict=True), key=lambda pair: pair[1].num_tokens):
            alone_s = ready_in_s + (here_tokens + sequence.num_tokens) * 0.001
            if place is None:
                here_tokens += sequence.num_tokens
                continue
            given[place] += sequence.num_tokens
            paced = PACED if others[place].num_sequences else 1.0
            there_s = (others[place].pace.backlog_tokens + given[place]) * 0.001 * paced
            assert DOUBT * there_s < alone_s
            assert there_s + MIN_GAIN_S < alone_s
            assert given[place] <= others[place].room_tokens


def test_how_long_a_replacement_takes_is_learned() -> None:
    times = TakeoverTimes()

    def ready_in_s(**changes):
        return times.ready_in_s(**{"replaced": False, "loading": False, "lost_for_s": 0.0, **changes})

    assert ready_in_s() is None
    assert ready_in_s(replaced=True) == 0.0
    times = times.after(opening_s=0.4)
    assert ready_in_s() is None
    times = times.after(replacing_s=10.0, binding_s=4.0)
    assert ready_in_s() == pytest.approx(10.4)
    assert ready_in_s(lost_for_s=8.0) == pytest.approx(2.4)
    assert ready_in_s(lost_for_s=12.0) == pytest.approx(0.4)  # it must come any moment
    assert ready_in_s(lost_for_s=15.1) is None  # what it took is no guide
    assert ready_in_s(loading=True) == pytest.approx(4.4)
    assert ready_in_s(replaced=True, lost_for_s=100.0) == pytest.approx(0.4)
    assert ready_in_s(replaced=True, num_failed_attempts=MOST_ATTEMPTS) is None
    times = times.after(replacing_s=20.0)
    assert ready_in_s() == pytest.approx(15.4)
