"""A short version of scenarios.py: Serve's controller dies with a stage, and Serve rolls every stage, under load."""

from __future__ import annotations

import json
import subprocess
import sys


def test_controller_killed_and_every_stage_rolled() -> None:
    # A process of its own: Ray cannot be started in one process twice with different settings.
    command = [sys.executable, "-m", "tests.chaos.scenarios", "controller", "rolling", "--rounds=1", "--streams=4",
               "--num-tokens=80", "--seed=3"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    summaries = {line["scenario"]: line for line in lines if "faults" in line}
    assert set(summaries) == {"controller", "rolling"}, done.stderr[-4000:]
    for summary in summaries.values():
        assert summary["faults"] == []
        assert summary["tokens_compared"] > summary["tokens_undisturbed"] == 4 * 80
    events = [(line["event"], line["stage"]) for line in lines if "event" in line]
    assert ("killed together", "controller") in events
    # Both replicas of both stages went, and no request failed.
    assert sorted(events[2:]) == [("rolled", "0-2")] * 2 + [("rolled", "2-4")] * 2
    assert done.returncode == 0
