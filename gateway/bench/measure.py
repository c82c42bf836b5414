"""The measurements: each runs load, takes the median over repeats and returns plain figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gateway.bench.load import Generator, Outcome, Shape
from stageline.errors import UnavailableError

Figures = dict[str, Any]


async def latency(load: Generator, shape: Shape, repeats: int) -> Figures:
    """One stream alone: time to first token, time between tokens, decode rate."""
    await load.run(shape)  # warm
    outcomes = [checked([await load.run(shape)])[0] for _ in range(repeats)]
    gaps_s = [gap for outcome in outcomes for gap in outcome.gaps_s]
    return {
        "ttft_ms": milliseconds(statistics.median(outcome.ttft_s for outcome in outcomes)),
        "prefill_tokens_per_s": round(
            statistics.median(shape.prompt_tokens / outcome.ttft_s for outcome in outcomes), 1
        ),
        "itl_ms": percentiles(gaps_s),
        "decode_tokens_per_s": round(
            statistics.median((len(o.token_s) - 1) / (o.token_s[-1] - o.token_s[0]) for o in outcomes), 2
        ),
        "runs": repeats,
    }


async def throughput(load: Generator, shape: Shape, streams: int, repeats: int, *, warm: bool = True) -> Figures:
    """Many streams that begin together: tokens a second of all of them while all of them decode, and end to end."""
    if warm:
        await load.closed_loop([shape] * streams, streams)
    decode, total = [], []
    for _ in range(repeats):
        outcomes = checked(await load.closed_loop([shape] * streams, streams))
        began, ended = max(o.token_s[0] for o in outcomes), min(o.token_s[-1] for o in outcomes)
        inside = sum(began < at <= ended for o in outcomes for at in o.token_s)
        if inside:
            decode.append(inside / (ended - began))
        span_s = max(o.token_s[-1] for o in outcomes) - min(o.sent_s for o in outcomes)
        total.append(sum(len(o.token_s) for o in outcomes) / span_s)
    return {
        "streams": streams,
        "decode_tokens_per_s": round(statistics.median(decode), 1) if decode else None,
        "output_tokens_per_s": round(statistics.median(total), 1),
        "runs": [round(rate, 1) for rate in total],
    }


async def serving(load: Generator, shapes: Sequence[Shape], requests_per_s: float) -> Figures:
    """Poisson arrivals of conversation-like lengths: throughput, time to first token and between tokens."""
    outcomes = await load.poisson(shapes, requests_per_s)
    done = [outcome for outcome in outcomes if not outcome.error and outcome.token_s]
    if not done:
        raise UnavailableError("NOTHING_SERVED", f"no request was served: {outcomes[0].error}")
    span_s = max(o.token_s[-1] for o in done) - min(o.sent_s for o in done)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error}),
        "offered_requests_per_s": requests_per_s,
        "served_requests_per_s": round(len(done) / span_s, 3),
        "output_tokens_per_s": round(sum(len(o.token_s) for o in done) / span_s, 1),
        "ttft_ms": percentiles([o.ttft_s for o in done]),
        "itl_ms": percentiles([gap for o in done for gap in o.gaps_s]),
    }


def checked(outcomes: list[Outcome]) -> list[Outcome]:
    """Raises UnavailableError where a request failed or came back short: such a figure would mean nothing."""
    for outcome in outcomes:
        if outcome.error or len(outcome.token_s) != outcome.shape.new_tokens:
            what = outcome.error or f"{len(outcome.token_s)} of {outcome.shape.new_tokens} tokens came"
            raise UnavailableError("REQUEST_FAILED", f"a request of the benchmark failed: {what}")
    return outcomes


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile (nearest rank), in milliseconds."""
    ordered = sorted(values_s)
    if not ordered:
        return {}
    return {name: milliseconds(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}  # fmt: skip


def milliseconds(value_s: float) -> float:
    """Seconds as milliseconds, to a microsecond."""
    return round(value_s * 1000, 3)
