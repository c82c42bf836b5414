"""A short version of scenarios.py: Serve's controller dies together with a stage, under load."""

from __future__ import annotations

import json
import subprocess
import sys


def test_controller_and_a_stage_killed_together() -> None:
    # A process of its own: Ray cannot be started in one process twice with different settings.
    command = [sys.executable, "-m", "tests.chaos.scenarios", "controller", "--rounds=1", "--streams=4",
               "--num-tokens=80", "--seed=3"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    # Ray writes beside them what it has to say of killed processes.
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    summaries = [line for line in lines if "faults" in line]
    assert [summary["scenario"] for summary in summaries] == ["controller"], done.stderr[-4000:]
    (summary,) = summaries
    assert summary["faults"] == []
    assert summary["tokens_compared"] > summary["tokens_undisturbed"] == 4 * 80
    killed = [line["stage"] for line in lines if line.get("event") == "killed together"]
    assert len(killed) == 2
    assert "controller" in killed
    assert done.returncode == 0
