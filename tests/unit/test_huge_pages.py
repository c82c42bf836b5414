"""Large tensors of a stage lie in huge pages, unless the environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import stages, torch, pathlib
kept = torch.ones(64 << 20, dtype=torch.uint8)
rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
print(next(line.split()[1] for line in rollup.splitlines() if line.startswith("AnonHugePages")))
"""


def huge_kib(**environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="the kernel gives huge pages to all or none"
)
def test_large_tensors_lie_in_huge_pages() -> None:
    assert huge_kib() > 32 << 10
    assert huge_kib(THP_MEM_ALLOC_ENABLE="0") < 32 << 10
