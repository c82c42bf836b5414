"""`python -m stages`: a stage without Ray, as a process, and what it says when it cannot serve."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys

import pytest

from gateway.pipelines.discovery import describe
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("alone") / "tiny")


def test_it_serves_its_layers_until_sigterm(folder) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "--model", str(folder), "--layers", "1-3", "--port", "0", "--dtype", "float32"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready, address, *layers = process.stdout.readline().split()
        assert (ready, layers) == ("ready", ["layers", "1-3"])
        record = asyncio.run(describe(address.removeprefix("grpc://")))
        assert (record.start_layer, record.end_layer, record.num_layers, record.pid) == (1, 3, 4, process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--layers", "2-9"), "not within the model's 4 layers"),
        (("--layers", "0-1,1-2"), "takes one range"),
        (("--layers", "zero"), "half-open range"),
        (("--model", "nowhere/at/all", "--layers", "0-1"), "nowhere/at/all"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(folder, args, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages", "--model", str(folder), "--port", "0", *args],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named(folder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "stages", "--model", str(folder), "--layers", "0-4", "--port", port],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert port in done.stderr
