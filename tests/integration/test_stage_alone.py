"""`python -m stages`: a stage without Ray, as a process, and what it says when it cannot serve."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import grpc.aio
import pytest
import torch

from gateway.pipelines.discovery import describe
from stageline.errors import ConfigError, UnavailableError
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.__main__ import main
from stages.replica import StageReplica
from stages.server.access import OPEN, StageAccess
from stages.spec import StageSpec
from tests.certificates import Authority
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("alone") / "tiny")


@contextmanager
def alone(
    folder: Path, layers: str, *flags: str, stderr: TextIO | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A stage process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "--model", str(folder), "--layers", layers, "--port", "0", "--dtype", "float32", *flags],
        stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready, address, *held = process.stdout.readline().split()
        assert (ready, held) == ("ready", ["layers", layers])
        yield process, address.removeprefix("grpc://")
    finally:
        process.kill()
        process.wait()


def test_it_serves_its_layers_until_sigterm(folder) -> None:
    with alone(folder, "1-3") as (process, address):
        record = asyncio.run(describe(address))
        assert (record.start_layer, record.end_layer, record.num_layers, record.pid) == (1, 3, 4, process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


async def test_a_spare_loads_the_stage_it_is_bound_to(folder) -> None:
    spec = StageSpec(model=str(folder), start_layer=None, end_layer=None, dtype="float32", num_blocks=8, num_threads=1)
    spare, whole = StageReplica(spec), StageReplica(replace(spec, start_layer=1, end_layer=4))
    try:
        await spare.start()
        await whole.start()
        assert spare.metadata() | {"bindable": True} == spare.metadata()
        before = await describe(spare.address)
        assert (before.bindable, before.end_layer, before.num_layers, before.model) == (True, 0, 4, str(folder))
        assert before.memory_bytes > 1 << 20
        async with grpc.aio.insecure_channel(spare.address) as channel:
            stub = pb_grpc.StageServiceStub(channel)
            request = pb.BindRequest(
                owner_id="o", incarnation=before.incarnation, start_layer=1, end_layer=4, lease_s=60
            )
            await stub.Bind(request, timeout=10)
            async with asyncio.timeout(30):
                while (after := await describe(spare.address)).state != pb.STAGE_STATE_CLAIMED:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        bound_from_start = await describe(whole.address)
        for ours in ("incarnation", "epoch", "owner_id", "state", "bindable", "memory_bytes", "model"):
            after.ClearField(ours)
            bound_from_start.ClearField(ours)
        assert after == bound_from_start
    finally:
        await spare.stop()
        await whole.stop()


def test_a_spare_without_ray(folder) -> None:
    with alone(folder, "any") as (process, address):
        assert asyncio.run(describe(address)).bindable
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_it_refuses_strangers(folder, tmp_path) -> None:
    authority = Authority("ours")
    files = authority.issue(tmp_path / "stage")
    (tmp_path / "token").write_text("5e" * 32)
    flags = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", path)]
    with alone(folder, "0-1", *flags, "--token-file", str(tmp_path / "token")) as (process, address):
        friend = StageAccess(**authority.issue(tmp_path / "friend"), token_file=str(tmp_path / "token"))
        assert asyncio.run(describe(address, access=friend)).pid == process.pid
        for stranger in (OPEN, StageAccess(**authority.issue(tmp_path / "stranger"))):
            with pytest.raises(UnavailableError, match="no stage answers"):
                asyncio.run(describe(address, access=stranger))


def test_its_log_lines_are_objects(folder, tmp_path) -> None:
    (tmp_path / "token").write_text("5e" * 32)
    flags = ("--token-file", str(tmp_path / "token"), "--log-format", "json")
    with (
        (tmp_path / "stderr.txt").open("w") as stderr,
        alone(folder, "0-1", *flags, stderr=stderr) as (process, address),
    ):
        with pytest.raises(UnavailableError, match="no stage answers"):
            asyncio.run(describe(address))
    [line] = (tmp_path / "stderr.txt").read_text().splitlines()
    said = json.loads(line)
    assert (said["level"], said["logger"], said["layers"], said["pid"]) == (
        "WARNING", "stageline.security", "0-1", process.pid,
    )  # fmt: skip
    assert said["message"].startswith("refused 1 calls without the stages' token")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--token-file", "nowhere", "--layers", "0-1"), "nowhere cannot be read"),
        (("--certificate-file", "alone.pem", "--layers", "0-1"), "belong together"),
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


WRONG_ARGUMENTS = [
    (("--port", "99999"), "port must be an integer in [0, 65535], got 99999"),
    (("--port", "-1"), "port must be an integer in [0, 65535], got -1"),
    (("--num-blocks", "-3"), "num_blocks must be an integer in [2, "),
    (("--num-blocks", "0"), "num_blocks must be an integer in [2, "),
    (("--num-blocks", "1"), "num_blocks must be an integer in [2, "),
    (("--num-threads", "0"), "num_threads must be an integer in [1, "),
    (("--block-size-tokens", "0"), "block_size_tokens must be an integer in [1, "),
    (("--block-size-tokens", "-1"), "block_size_tokens must be an integer in [1, "),
    (("--kv-memory-bytes", "-5"), "kv_memory_bytes must be an integer in [1, "),
    (("--dtype", "float16"), "dtype must be one of float32, bfloat16, got 'float16'"),
    (("--log-format", "xml"), "log_format must be one of text, json, got 'xml'"),
    (("--device", "tpu"), "device must be one of cpu, cuda, got 'tpu'"),
    (("--host", ""), "host must be text that is not empty, got ''"),
    (("--layers", "3-3"), "end_layer must be above start_layer (3), got 3"),
]


@pytest.mark.parametrize(("args", "says"), WRONG_ARGUMENTS)
def test_wrong_arguments_end_with_2(monkeypatch, capsys, args, says: str) -> None:
    monkeypatch.setattr(sys, "argv", ["stages", "--model", "nowhere", "--layers", "0-4", "--port", "0", *args])
    assert main() == 2
    assert says in capsys.readouterr().err


def test_a_wrong_argument_is_told_before_torch_is_loaded() -> None:
    code = (
        "import sys; from stages.__main__ import main; sys.argv[1:] = "
        "'--model m --layers 0-1 --port 99999'.split(); code = main(); sys.exit(code + 100 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_threads": "2"}, "num_threads"),
        ({"port": 7001.0}, "port"),
        ({"num_blocks": True}, "num_blocks"),
        ({"queue_depth_steps": 0}, "queue_depth_steps"),
        ({"start_layer": -1}, "start_layer"),
        ({"start_layer": None}, "start_layer"),
        ({"batch_invariant": "no"}, "batch_invariant"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"revision": 3}, "revision"),
        ({"model": 7}, "model"),
    ],
    ids=str,
)
def test_a_specification_from_another_process_is_checked_too(change, field: str) -> None:
    plain = StageSpec(model="m", start_layer=0, end_layer=4).to_dict()
    assert StageSpec.from_dict(plain).to_dict() == plain
    with pytest.raises(ConfigError, match=f"{field} must be .*, got ") as caught:
        StageSpec.from_dict({**plain, **change})
    assert caught.value.metadata["field"] == field
    with pytest.raises(ConfigError, match="missing fields model"):
        StageSpec.from_dict({"start_layer": 0, "end_layer": 1})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_named(folder, monkeypatch, capsys) -> None:
    arguments = ["--model", str(folder), "--layers", "0-4", "--port", "0", "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["stages", *arguments])
    assert main() == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_host_that_is_not_ours_is_not_a_taken_port(folder, monkeypatch, capsys) -> None:
    arguments = ["--model", str(folder), "--layers", "0-4", "--port", "0", "--host", "192.0.2.1"]
    monkeypatch.setattr(sys, "argv", ["stages", *arguments])
    assert main() == 2
    assert "[HOST_NOT_LOCAL]" in capsys.readouterr().err


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
