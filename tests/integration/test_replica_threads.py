"""Loading leaves no OpenMP pool behind: a second one makes libgomp sleep at every barrier of the compute thread."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, os, sys, time
import torch
from stages.replica import on_ending_thread

torch.set_num_threads(3)

def work():
    x = torch.ones(1 << 22)
    return float((x + x).sum())  # large enough for all threads

def num_threads():
    return len(os.listdir("/proc/self/task"))

async def main():
    before = num_threads()
    await {how}(work)
    deadline_s = time.monotonic() + 10
    while num_threads() > before and time.monotonic() < deadline_s:
        await asyncio.sleep(0.02)
    print(num_threads() - before)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(("how", "left"), [("on_ending_thread", 0), ("asyncio.to_thread", 3)])
def test_threads_that_a_load_leaves_behind(how: str, left: int) -> None:
    """The twin shows that the count sees a pool: a thread that lives on, and its two helpers."""
    script = SCRIPT.replace("{how}", how)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == left
