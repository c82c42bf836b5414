"""What every figure needs beside it: the machine and the commit."""

from __future__ import annotations

import os
import platform
import subprocess


def here() -> dict[str, str]:
    """`hardware` and `commit` (empty outside of a checkout) of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "commit": commit.stdout.strip(),
    }
