"""Log lines that cannot be written are lost, and nothing else, although Serve sends a replica's stderr to its log."""

from __future__ import annotations

import subprocess
import sys

REPLICA = """
import logging, sys
from ray.serve._private.logging_utils import StreamToLogger
from stages.logs import log_to_stderr

full = open("/dev/full", "w")
serve = logging.getLogger("ray.serve")
serve.addHandler(logging.StreamHandler(full))
sys.__stderr__, sys.stderr = full, StreamToLogger(serve, logging.INFO, full)
log_to_stderr()
logging.getLogger("stageline").warning("this and its traceback have no place to go")
serve.warning("nor has this")
sys.stdout.write("went on")
sys.stdout.flush()
import os; os._exit(0)
"""


def test_a_full_disk_costs_log_lines_only() -> None:
    done = subprocess.run([sys.executable, "-c", REPLICA], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("went on", 0), done.stderr[-2000:]
