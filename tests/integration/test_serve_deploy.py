"""The application under Ray Serve's own commands: `serve deploy` of a YAML file and `serve run` with arguments."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
import yaml

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.parity.test_model import reference
from tests.ports import free_ports
from tests.ray_environment import RAY_ENVIRONMENT
from tests.tiny import save_tiny, tiny_model

PROMPT = [5, 77, 300, 12, 9, 9, 41]
ENV = {**os.environ, **RAY_ENVIRONMENT}


def script(name: str, *args: str) -> list[str]:
    return [str(Path(sys.executable).with_name(name)), *args]


def until(condition: Callable[[], bool], what: str, timeout_s: float = 240.0, address: str | None = None) -> None:
    """Wait for `condition`; a failure shows what Serve says at the dashboard's `address`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            command = script("serve", "status", "--address", str(address))
            status = (
                subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=60).stdout if address else ""
            )
            pytest.fail(f"waited in vain for {what}: {status}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def ray_cluster(folder: Path, dashboard_port: int) -> Iterator[str]:
    """A cluster of this host alone, in processes of ours; yields its address."""
    command = script(
        "ray", "start", "--head", "--block", "--port=0", f"--dashboard-port={dashboard_port}", f"--temp-dir={folder}",
        "--num-cpus=2",
    )  # fmt: skip
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENV)
    try:
        current = folder / "ray_current_cluster"
        until(lambda: current.exists() and answers(f"http://127.0.0.1:{dashboard_port}/api/version"), "Ray to start")
        yield current.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def check_both_doors(http: str, grpc_port: int) -> None:
    expected = reference(tiny_model(), PROMPT, 12)
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{http}/v1/completions", json=body, timeout=60).json()
    generation = gen.Generation(
        token_ids=gen.TokenIds(ids=PROMPT),
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=12, ignore_eos=True),
    )
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        choice = (
            InferenceServiceStub(channel).Generate(pb.GenerateRequest(generation=generation), timeout=60).choices[0]
        )
    assert list(choice.token_ids) == expected
    assert answer["choices"][0]["text"] == choice.text


@pytest.mark.timeout(900)
def test_serve_deploy_and_serve_run(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", tiny_model())
    dashboard, http, *grpc_ports = free_ports(4)
    application = {
        "name": "deployed",
        "route_prefix": "/",
        "import_path": "gateway.app:build",
        "args": {
            "model": {"path": str(model), "dtype": "float32"},
            "stages": {"count": 2},
            "kv_cache": {"num_blocks": 64},
            "server": {"grpc_port": grpc_ports[0]},
        },
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"port": http}, "applications": [application]}))
    at_dashboard = ("--address", f"http://127.0.0.1:{dashboard}")
    # Not tmp_path: Ray's sockets lie in it, and a socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with ray_cluster(Path(folder), dashboard) as address:
            subprocess.run(script("serve", "deploy", *at_dashboard, str(file)), check=True, env=ENV, timeout=120)
            base = f"http://127.0.0.1:{http}"
            until(lambda: answers(f"{base}/readyz"), "the deployed application", address=at_dashboard[1])
            check_both_doors(base, grpc_ports[0])

            # A second application beside it, with the arguments as `serve run` takes them.
            pairs = (f"model={model}", "stages=3", "dtype=float32", f"grpc_port={grpc_ports[1]}")
            command = script(
                "serve", "run", "gateway.app:build", "--address", address, "--name", "run", "--route-prefix", "/run",
                *pairs, "kv_cache.num_blocks=64",
            )  # fmt: skip
            with (tmp_path / "run.log").open("w") as log:
                # Shells start background jobs with SIGINT ignored, and children inherit that; `serve run` ends by it.
                running = subprocess.Popen(
                    command, stdout=log, stderr=log, env=ENV,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )  # fmt: skip
            until(lambda: answers(f"{base}/run/readyz"), "the application of serve run", address=at_dashboard[1])
            check_both_doors(f"{base}/run", grpc_ports[1])
            running.send_signal(signal.SIGINT)
            running.wait(timeout=60)

            subprocess.run(script("serve", "shutdown", "--yes", *at_dashboard), check=True, env=ENV, timeout=60)
            until(lambda: not answers(f"{base}/healthz"), "the end of the applications")
    for port in (http, *grpc_ports):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_build_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from gateway.app import build
    from stageline.errors import ConfigError

    model = str(save_tiny(tmp_path / "tiny"))
    for args, says in (
        ({}, "model is required"),
        ({"model": model, "stages.number": "2"}, "stages.number"),
        ({"model": model, "http_port": "8000"}, "http_options"),
        ({"model": model, "stages": "2", "stages.count": "3"}, "stages.count twice"),
    ):
        with pytest.raises(ConfigError, match=says):
            build(args)
    assert build({"model": model, "stages": "2"}) is not None
