"""A server of our own for the length of a benchmark."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GATEWAY = "ray::ServeReplica:stageline:gateway"
"""The command line of a server's gateway process."""


@contextmanager
def serving(model: str, stages: int, *flags: str) -> Iterator[str]:
    """`stageline serve` on free ports; gives its gRPC address."""
    with serving_doors(model, stages, *flags) as (_, grpc_address):
        yield grpc_address


@contextmanager
def given_or_serving(server: tuple[str, str] | None, model: str, stages: int, *flags: str) -> Iterator[tuple[str, str]]:
    """The doors of the server that is given, else of one of our own."""
    if server is not None:
        yield server
        return
    with serving_doors(model, stages, *flags) as doors:
        yield doors


@contextmanager
def serving_doors(model: str, stages: int, *flags: str) -> Iterator[tuple[str, str]]:
    """`stageline serve` on free ports; gives the URL of its HTTP door and its gRPC address."""
    command = [sys.executable, "-m", "gateway.cli", "serve", "--model", model, "--stages", str(stages),
               "--grpc-port", "0", "--http-port", "0", *flags]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        if len(ready) != 3:
            raise SystemExit(process.wait() or 1)
        yield ready[1], ready[2].removeprefix("grpc://")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
