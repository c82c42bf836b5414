"""Clocks of several hosts brought together, shares of time, and Chrome trace events."""

from __future__ import annotations

import random

import pytest

from gateway.timeline.chrome import chrome_trace
from gateway.timeline.clocks import offsets_ns, on_one_clock
from gateway.timeline.shares import stage_shares
from stageline.operations.v1 import operations_service_pb2 as pb

HOP_NS = 200_000


def pipeline(num_steps: int, starts_ns: list[int], *, hop_ns=lambda: HOP_NS, work_ns: int = 5_000_000) -> list[pb.Step]:
    """Steps one after another through stages whose clocks are `starts_ns` ahead of the gateway's."""
    steps, now_ns = [], 10**14  # times on the wire are not negative
    for step_id in range(1, num_steps + 1):
        step = pb.Step(pipeline="0", epoch=3, step_id=step_id, num_decode_tokens=4, sent_ns=now_ns)
        for place, ahead_ns in enumerate(starts_ns):
            now_ns += hop_ns()
            step.stages.add(
                layers=f"{place}-{place + 1}", received_ns=now_ns + ahead_ns, started_ns=now_ns + ahead_ns + 1000,
                finished_ns=now_ns + ahead_ns + 1000 + work_ns, cpu_ns=work_ns // 2,
            )  # fmt: skip
            now_ns += 1000 + work_ns
        now_ns += hop_ns()
        step.returned_ns = now_ns
        steps.append(step)
    return steps


@pytest.mark.parametrize("starts_ns", [[0], [0, 0, 0], [-(10**12), 7 * 10**15, 123]])
def test_equal_hops_give_the_clocks_back_exactly(starts_ns: list[int]) -> None:
    assert offsets_ns(pipeline(4, starts_ns)) == [-start for start in starts_ns]


def test_clocks_are_off_by_less_than_the_shortest_hops_differ() -> None:
    draw = random.Random(1)
    starts_ns = [10**15, -(10**13), 5]
    steps = pipeline(200, starts_ns, hop_ns=lambda: int(draw.expovariate(1e-6)) + HOP_NS)
    for offset, start in zip(offsets_ns(steps), starts_ns, strict=True):
        assert abs(offset + start) < HOP_NS
    for step in on_one_clock(steps):
        times = [step.sent_ns, *(t for s in step.stages for t in (s.received_ns, s.finished_ns)), step.returned_ns]
        assert times == sorted(times), "no message may arrive before it was sent"


def test_every_epoch_has_its_own_clocks() -> None:
    before, after = pipeline(2, [10**15, 0]), pipeline(2, [0, 10**15])  # another host took a stage over
    for step in after:
        step.epoch = 4
    moved = on_one_clock(before + after)
    assert [stage.received_ns for step in moved for stage in step.stages] == [
        stage.received_ns for steps in (pipeline(2, [0, 0]),) for step in sorted(steps * 2, key=lambda s: s.returned_ns)
        for stage in step.stages
    ]  # fmt: skip
    assert before[0].stages[0].received_ns > 10**15, "the argument must stay as it was"


def test_steps_that_failed_on_the_way_are_left_out() -> None:
    steps = pipeline(3, [0, 0])
    steps[1].stages[1].finished_ns = 0
    assert [step.step_id for step in on_one_clock(steps)] == [1, 3]
    assert [shares.num_steps for shares in stage_shares(steps)] == [3, 2]


def test_shares() -> None:
    first, second = stage_shares(pipeline(10, [0, 10**15]))
    assert (first.layers, second.layers, first.num_steps) == ("0-1", "1-2", 10)
    ring_ns = 2 * (5_000_000 + 1000) + 3 * HOP_NS
    seconds = (9 * ring_ns + 5_000_000) / 1e9
    for shares in (first, second):
        assert shares.seconds == pytest.approx(seconds)
        assert shares.computing == pytest.approx(0.05 / seconds)
        assert shares.on_cpu == pytest.approx(0.025 / seconds)
        assert shares.waiting_ms == pytest.approx(0.001)


def test_chrome_events() -> None:
    steps = pipeline(3, [0, 0])
    steps[2].num_prefill_tokens = 77
    events = chrome_trace(steps)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "gateway", 1: "stage 0, layers 0-1", 2: "stage 1, layers 1-2"}
    slices = [event for event in events if event["ph"] == "X"]
    assert [(e["tid"], e["cat"]) for e in slices] == [
        (1, "decode"), (2, "decode"), (1, "decode"), (2, "decode"), (1, "prefill"), (2, "prefill"),
    ]  # fmt: skip
    assert slices[0]["ts"] == pytest.approx((HOP_NS + 1000) / 1e3)
    assert slices[0]["dur"] == pytest.approx(5000)
    assert slices[0]["args"]["CPU, ms"] == 2.5
    begins, ends = ([e for e in events if e["ph"] == phase] for phase in "be")
    assert [e["id"] for e in begins] == [e["id"] for e in ends]
    assert begins[0]["ts"] == 0
    assert all(b["ts"] < e["ts"] for b, e in zip(begins, ends, strict=True))
