"""The framed stream puts together what was taken apart and refuses anything else; a stage has one owner at a time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageline.errors import FailedPreconditionError, InvalidArgumentError, StagelineError
from stages.server.claims import Claims, State
from stages.server.frames import MAX_DATA_BYTES, Assembler, StepFrame, encode

frames = st.builds(
    StepFrame,
    epoch=st.integers(0, 2**63),
    step_id=st.integers(0, 2**63),
    header=st.binary(max_size=300),
    trace=st.binary(max_size=50),
    element_type=st.integers(0, 3),
    payload=st.binary(max_size=2000),
)


@given(st.lists(frames, max_size=4))
def test_what_was_sent_arrives(sent: list[StepFrame]) -> None:
    assembler, got = Assembler(), []
    for frame in sent:
        answers = [assembler.feed(message) for message in encode(frame)]
        assert answers[:-1] == [None] * (len(answers) - 1)
        got.append(answers[-1])
    assert [(f.epoch, f.step_id, f.header, f.trace, bytes(f.payload)) for f in got] == [
        (f.epoch, f.step_id, f.header, f.trace, bytes(f.payload)) for f in sent
    ]


def test_large_payloads_go_in_frames_of_one_mebibyte() -> None:
    payload = bytes(range(256)) * (10 * MAX_DATA_BYTES // 256) + b"end"
    messages = list(encode(StepFrame(1, 2, b"header", payload=payload)))
    assert len(messages) == 1 + 11
    assembler = Assembler()
    last = [assembler.feed(message) for message in messages][-1]
    assert last is not None
    assert last.payload == payload


@settings(max_examples=300)
@given(frames, st.data())
def test_damaged_streams_are_refused_or_incomplete_never_misread(frame: StepFrame, data: st.DataObject) -> None:
    messages = list(encode(frame))
    index = data.draw(st.integers(0, len(messages) - 1))
    cut = data.draw(st.integers(0, len(messages[index]) - 1))
    messages[index] = messages[index][:cut]
    assembler = Assembler()
    for message in messages[:index]:
        assembler.feed(message)
    with pytest.raises(InvalidArgumentError, match="malformed frame"):
        assembler.feed(messages[index])


def test_a_step_cannot_begin_within_another() -> None:
    first, *_ = encode(StepFrame(1, 1, b"h", payload=b"x" * 10))
    assembler = Assembler()
    assembler.feed(first)
    with pytest.raises(InvalidArgumentError, match="before the payload"):
        assembler.feed(first)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "renew", "release", "connect", "expire"]),
        st.sampled_from(["a", "b"]),
        st.floats(0, 3),
        st.integers(0, 12),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_epochs_only_grow_and_a_running_lease_keeps_others_out(actions) -> None:
    claims, now, held = Claims(incarnation="i"), 0.0, dict.fromkeys("ab", 0)
    for action, who, passed, min_epoch in actions:
        now += passed
        before = claims
        try:
            if action == "claim":
                claims = claims.claim(owner_id=who, incarnation="i", min_epoch=min_epoch, lease_s=2.0, now_s=now)
                held[who] = claims.epoch
                assert claims.epoch > before.epoch
                assert before.owner_id in ("", who) or before.expired(now)
            elif action == "renew":
                claims = claims.renew(epoch=held[who], incarnation="i", now_s=now)
                assert claims.owner_id == who
            elif action == "release":
                claims = claims.release(epoch=held[who], incarnation="i", now_s=now)
                assert before.owner_id == who
            elif action == "connect":
                claims = claims.connect(epoch=held[who], now_s=now)
                assert claims.owner_id == who
            else:
                claims = claims.expire(now)
        except StagelineError:
            claims = before
        assert claims.epoch >= before.epoch
        for other in "ab":
            if other != claims.owner_id:
                with pytest.raises(FailedPreconditionError):
                    claims.check(epoch=held[other], now_s=now)


def test_an_owner_paused_past_its_lease_is_fenced() -> None:
    claims = Claims(incarnation="i").claim(owner_id="a", incarnation="i", min_epoch=0, lease_s=1, now_s=0)
    with pytest.raises(FailedPreconditionError, match="owned by a"):
        claims.claim(owner_id="b", incarnation="i", min_epoch=0, lease_s=1, now_s=0.5)
    taken = claims.claim(owner_id="b", incarnation="i", min_epoch=7, lease_s=1, now_s=1.5)
    assert (taken.epoch, taken.owner_id, taken.state) == (7, "b", State.CLAIMED)
    with pytest.raises(FailedPreconditionError) as caught:
        taken.renew(epoch=claims.epoch, incarnation="i", now_s=1.6)
    assert caught.value.reason == "STALE_EPOCH"


def test_another_incarnation_and_a_draining_stage_refuse() -> None:
    claims = Claims(incarnation="i")
    with pytest.raises(FailedPreconditionError) as caught:
        claims.claim(owner_id="a", incarnation="old", min_epoch=0, lease_s=1, now_s=0)
    assert caught.value.reason == "WRONG_INCARNATION"
    with pytest.raises(FailedPreconditionError) as caught:
        claims.drain().claim(owner_id="a", incarnation="i", min_epoch=0, lease_s=1, now_s=0)
    assert caught.value.reason == "STAGE_DRAINING"


def test_wiring_does_not_undo_draining_and_nothing_undoes_a_failure() -> None:
    owned = Claims(incarnation="i").claim(owner_id="a", incarnation="i", min_epoch=0, lease_s=9, now_s=0)
    draining = owned.drain().connect(epoch=1, now_s=1)
    assert (draining.state, draining.connected) == (State.DRAINING, True)
    draining.renew(epoch=1, incarnation="i", now_s=2)
    failed = owned.fail("no device")
    with pytest.raises(FailedPreconditionError) as caught:
        failed.claim(owner_id="a", incarnation="i", min_epoch=0, lease_s=9, now_s=1)
    assert caught.value.reason == "STAGE_FAILED"
    with pytest.raises(FailedPreconditionError) as caught:
        failed.renew(epoch=1, incarnation="i", now_s=1)
    assert caught.value.reason == "STALE_EPOCH"
