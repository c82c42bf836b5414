"""The recovery protocol, every interleaving of small cases and random ones of large cases; and that a broken one is found out.

What holds in every state is asserted in recovery_model.py: a stage executes for the one gateway that owns it, steps of its
epoch alone, each once and in order; a pipeline has one epoch; a result is counted once, by the gateway whose epoch it is of, and
no token is lost or repeated; and from wherever faults stop, all work ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_model import Budget, Explored, Model, explore

from gateway.pipelines import protocol
from gateway.pipelines.protocol import StepWindow, next_claim
from stageline.errors import UnavailableError
from stages.server.claims import Bind, Claims
from stages.server.intake import Intake

TWO_STAGES = (0, 1)  # the default has a spare of the second
SPARE = (0, 1, None)
SMALL = {
    "a stage dies and there is a spare": Model(budget=Budget(deaths=1, attempts=1)),
    "a stage dies, steps are repeated and overtake": Model(
        num_gateways=1, num_sequences=1, num_tokens=2, budget=Budget(deaths=1, repeats=1, reorderings=1, attempts=2)
    ),
    "an owner is paused past its lease": Model(num_sequences=1, budget=Budget(expiries=1, attempts=1)),
    "an owner is paused past its lease, and both try again": Model(
        layers=TWO_STAGES, num_sequences=1, budget=Budget(expiries=1, attempts=2)
    ),
    "a gateway dies and a lease runs out": Model(
        layers=TWO_STAGES, num_sequences=1, budget=Budget(gateway_deaths=1, expiries=1, attempts=1)
    ),
    "a pipeline is given up with steps out": Model(
        num_gateways=1, layers=TWO_STAGES, budget=Budget(give_ups=1, expiries=1, attempts=2)
    ),
    "calls and steps are repeated and overtake": Model(
        layers=TWO_STAGES, num_sequences=1, budget=Budget(repeats=1, reorderings=1, expiries=1, attempts=1)
    ),
    "a stage dies and a spare is bound to it": Model(
        num_gateways=1, layers=SPARE, num_sequences=1, budget=Budget(deaths=1, binds=1, failed_loads=1, attempts=2)
    ),
    "two gateways bind a spare to what they like": Model(
        layers=SPARE, num_sequences=1, budget=Budget(binds=2, attempts=1)
    ),
    "who bound a spare is paused past its lease": Model(
        layers=SPARE, num_sequences=1, budget=Budget(binds=1, expiries=1, attempts=1)
    ),
    "calls that bind are repeated": Model(
        layers=SPARE, num_gateways=1, num_sequences=1, budget=Budget(binds=2, repeats=1, attempts=1)
    ),
    "two steps overtake": Model(num_gateways=1, layers=TWO_STAGES, budget=Budget(repeats=1, reorderings=2, attempts=1)),
}


@pytest.mark.parametrize("case", SMALL)
def test_every_interleaving(case: str) -> None:
    found = explore(SMALL[case], max_states=60_000)
    assert not found.violation, _told(found)
    assert found.num_states > 200, "the case is not what its name says"


def _told(found: Explored) -> str:
    return "\n".join((*found.trace, found.violation))


def _grant_whoever_asks(self: Claims, **asked: object) -> Claims:
    return GRANT(replace(self, owner_id="", lease_ends_s=0.0), **asked)  # type: ignore[arg-type]


def _same_epoch_for_its_owner(self: Claims, **asked: object) -> Claims:
    granted = GRANT(self, **asked)  # type: ignore[arg-type]
    return replace(granted, epoch=self.epoch) if granted.owner_id == self.owner_id else granted


def _expire_in_the_same_epoch(self: Claims, now_s: float) -> Claims:
    return replace(self, owner_id="", lease_ends_s=-1.0) if self.owner_id and self.expired(now_s) else self


def _take_any_epoch(self: Intake, *, epoch: int, step_id: int) -> Intake:
    return ADMIT(self, epoch=self.epoch, step_id=step_id)


def _take_a_step_again(self: Intake, *, epoch: int, step_id: int) -> Intake:
    return ADMIT(replace(self, last_step=min(self.last_step, step_id - 1)), epoch=epoch, step_id=step_id)


def _skip_steps(self: Intake, *, epoch: int, step_id: int) -> Intake:
    return ADMIT(replace(self, last_step=max(self.last_step, step_id - 1)), epoch=epoch, step_id=step_id)


def _count_any_result(self: StepWindow, step_id: int) -> StepWindow:
    return replace(self, last_returned=min(self.last_returned + 1, self.last_sent))


def _wire_unequal_epochs(granted: tuple[int, ...]) -> tuple[int, int] | None:
    return next(((place, max(granted)) for place, epoch in enumerate(granted) if not epoch), None)


def _never_free(self: Claims, now_s: float) -> bool:
    return False


def _claim_whatever_it_holds(self: Claims, **asked: object) -> Claims:
    return GRANT(self, **{**asked, "layers": None})  # type: ignore[arg-type]


def _bind_whoever_asks(self: Claims, asked: Bind, **more: object) -> Claims:
    return BIND(replace(self, owner_id="", lease_ends_s=0.0), asked, **more)  # type: ignore[arg-type]


def _bind_in_any_epoch(self: Claims, asked: Bind, **more: object) -> Claims:
    return BIND(self, replace(asked, seen_epoch=self.epoch), **more)  # type: ignore[arg-type]


def _bind_while_it_loads(self: Claims, asked: Bind, **more: object) -> Claims:
    return BIND(replace(self, loading=False), asked, **more)  # type: ignore[arg-type]


def _claim_while_it_loads(self: Claims) -> None:
    return None


GRANT, BIND, ADMIT = Claims.claim, Claims.bind, Intake.admit
BROKEN: dict[str, tuple[object, str, Callable[..., object]]] = {
    "a lease keeps nobody out": (Claims, "claim", _grant_whoever_asks),
    "a second claim of one owner keeps the epoch": (Claims, "claim", _same_epoch_for_its_owner),
    "an expired lease leaves the epoch": (Claims, "expire", _expire_in_the_same_epoch),
    "leases never run out": (Claims, "expired", _never_free),
    "steps of any epoch are taken": (Intake, "admit", _take_any_epoch),
    "a step is taken twice": (Intake, "admit", _take_a_step_again),
    "a step is taken before the one before it": (Intake, "admit", _skip_steps),
    "any result is counted": (StepWindow, "take", _count_any_result),
    "a claim takes whatever stage is held": (Claims, "claim", _claim_whatever_it_holds),
    "a lease keeps nobody from binding": (Claims, "bind", _bind_whoever_asks),
    "a late call binds": (Claims, "bind", _bind_in_any_epoch),
    "a replica that loads is bound to something else": (Claims, "bind", _bind_while_it_loads),
    "a stage that still loads is claimed": (Claims, "check_bound", _claim_while_it_loads),
    "stages of different epochs are wired": (protocol, "next_claim", _wire_unequal_epochs),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_protocol_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, broken = BROKEN[fault]
    monkeypatch.setattr(place, name, broken)
    if place is protocol:
        monkeypatch.setattr("recovery_model.next_claim", broken)
    for model in reversed(SMALL.values()):  # the small ones first
        found = explore(model, max_states=60_000)
        if found.violation:
            assert found.trace
            return
    pytest.fail("no case notices it")


LARGE = Model(
    layers=(0, 1, 2, 0, 1, 2, None, None),
    num_gateways=3,
    num_sequences=3,
    num_tokens=3,
    max_in_flight=3,
    budget=Budget(
        deaths=4,
        gateway_deaths=1,
        expiries=4,
        repeats=4,
        reorderings=4,
        give_ups=3,
        failed_loads=2,
        binds=12,
        attempts=1000,
    ),
)


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), st.integers(1, 250))
def test_random_interleavings_of_a_large_case_all_end(random, num_moves: int) -> None:
    state = LARGE.start()
    for _ in range(num_moves):
        moves = list(LARGE.moves(state))
        if not moves:
            break
        state = random.choice(moves)[1]()
    LARGE.settle(state)


def test_claims_go_on_until_all_stages_granted_the_same_epoch() -> None:
    assert next_claim((0, 0, 0)) == (0, 0)
    assert next_claim((4, 0, 0)) == (1, 4)
    assert next_claim((4, 9, 0)) == (0, 9)
    assert next_claim((9, 9, 0)) == (2, 9)
    assert next_claim((9, 9, 9)) is None


def test_a_result_counts_only_when_it_is_due() -> None:
    window = StepWindow()
    assert window.oldest is None
    for wrong in (0, 1):
        with pytest.raises(UnavailableError, match="came where that of step None was due"):
            window.take(wrong)
    window = window.send(1).send(2)
    assert window.oldest == 1
    with pytest.raises(UnavailableError) as caught:
        window.take(2)
    assert caught.value.reason == "RESULT_OUT_OF_ORDER"
    assert window.take(1).oldest == 2
    assert window.take(1).take(2).oldest is None
