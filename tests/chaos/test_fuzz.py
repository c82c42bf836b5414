"""A short version of fuzz.py: 600 messages and 200 strings."""

from __future__ import annotations

import asyncio
import json

from tests.chaos.fuzz import run


def test_hostile_messages_and_strings_hurt_nobody() -> None:
    summary = asyncio.run(run(messages=600, strings=200, seed=3))
    assert summary["faults"] == [], json.dumps(summary, indent=2)
    counts = summary["counts"]
    for kind in ("inference messages", "strings over gRPC"):
        assert counts[kind]["OK"] > 20, counts
        assert counts[kind]["INVALID_ARGUMENT"] > 20, counts
    assert counts["strings over HTTP"]["200"] > 20, counts
    assert summary["witness_streams"] > 10
