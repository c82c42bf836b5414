"""What a client does not read: merged without loss, counted exactly, bounded."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.engine.deltas import Deltas, Unread
from gateway.types import ChoiceDelta, FinishReason, TokenLogprobs
from stageline.errors import InternalError, ResourceExhaustedError


def delta(index: int, place: int, *, num_logprobs: int | None = None, last: bool = False) -> ChoiceDelta:
    top = tuple((token, -1.0) for token in range(num_logprobs or 0))
    return ChoiceDelta(
        index=index,
        text=f"{index}.{place} ",
        token_ids=(place,),
        logprobs=() if num_logprobs is None else (TokenLogprobs(place, -0.5, top),),
        finish_reason=FinishReason.LENGTH if last else None,
        cached_prompt_tokens=place // 10,
    )


def together(deltas: list[ChoiceDelta]) -> tuple:
    return (
        "".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids],
        [entry for d in deltas for entry in d.logprobs], [d.finish_reason for d in deltas if d.finish_reason],
        deltas[-1].finish_reason, deltas[-1].cached_prompt_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
async def test_reading_at_any_pace_loses_nothing_and_counts_back_to_zero(seed):
    rng = random.Random(seed)
    unread, num_logprobs = Unread(), rng.choice([None, 0, 3])
    deltas, written, read = Deltas(unread), {0: [], 1: [], 2: []}, {0: [], 1: [], 2: []}
    places = [choice for choice in written for _ in range(30)]
    rng.shuffle(places)
    for choice in places:
        one = delta(choice, len(written[choice]), num_logprobs=num_logprobs, last=len(written[choice]) == 29)
        written[choice].append(one)
        assert deltas.put(one)
        while deltas._pending and rng.random() < 0.4:
            got = await deltas.get()
            read[got.index].append(got)
    while deltas._pending:
        got = await deltas.get()
        read[got.index].append(got)
    for choice in written:
        assert together(read[choice]) == together(written[choice])
    assert sum(map(len, read.values())) < 90, "nothing was merged"
    assert (unread.total, unread.num_readers) == (0, 0)


async def test_who_reads_at_once_gets_every_delta_as_it_was():
    deltas, sent = Deltas(), [delta(0, place) for place in range(5)]
    for one in sent:
        deltas.put(one)
        assert await deltas.get() is one


async def test_a_reader_that_waits_is_woken_by_deltas_and_by_the_error_which_comes_last():
    deltas = Deltas()
    waiting = asyncio.create_task(deltas.get())
    await asyncio.sleep(0)
    deltas.put(delta(0, 0))
    deltas.put(delta(1, 0))
    first, second = InternalError("A", "a"), InternalError("B", "b")
    deltas.fail(first)
    deltas.fail(second)
    assert not deltas.put(delta(0, 1))
    assert [(await waiting).index, (await deltas.get()).index] == [0, 1]
    assert await deltas.get() is first


async def test_a_reader_too_far_behind_loses_its_request_and_its_memory():
    unread = Unread(most=100)
    deltas = Deltas(unread)
    for place in range(25):
        assert deltas.put(delta(0, place, num_logprobs=2)), "a token and three entries each"
    assert unread.total == 100
    assert not deltas.put(delta(0, 25))
    assert unread.total == 0
    error = await deltas.get()
    assert isinstance(error, ResourceExhaustedError)
    assert (error.reason, error.metadata["unread"]) == ("READER_TOO_SLOW", "101")


async def test_when_all_together_leave_too_much_those_furthest_behind_lose():
    unread = Unread(most_total=100)
    slow, good = Deltas(unread), [Deltas(unread) for _ in range(10)]
    for number, one in enumerate(good):
        assert one.put(delta(0, number))
    kept = 0
    while slow.put(delta(0, kept)):
        kept += 1
    assert kept == 90
    assert all(one.put(delta(0, 7)) for one in good)
    assert unread.total == 20


async def test_a_closed_request_takes_nothing_with_it():
    unread = Unread()
    deltas = Deltas(unread)
    deltas.put(delta(0, 1))
    deltas.put(delta(0, 2))
    deltas.close()
    assert (unread.total, unread.num_readers) == (0, 0)
