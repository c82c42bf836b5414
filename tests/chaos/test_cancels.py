"""A short version of cancels.py: 500 cancels while a stage is killed."""

from __future__ import annotations

import asyncio
import json

from tests.chaos.cancels import nursery, run, toy_load


def test_cancels_at_random_times_leave_nothing_behind() -> None:
    with nursery() as children, toy_load(children, seed=3) as (load, stages):
        summary = asyncio.run(run(load, cancels=500, parallel=64, witnesses=6, kill=stages.kill, kills=1))
    assert summary["faults"] == [], json.dumps(summary, indent=2)
    assert summary["recoveries"] >= 1
    assert summary["witness_tokens"] >= 6 * 40
    outcomes = summary["outcomes"]
    for one in ("cancelled after a time", "cancelled after tokens", "http: disconnected", "RESOURCE_EXHAUSTED"):
        assert outcomes.get(one, 0) > 10, f"too few to mean anything: {outcomes}"
