"""`stageline serve` with everything locked: TLS at both doors, keys, mutual TLS and a token between the processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import pytest

from stageline.client import Client, Tls
from stageline.errors import StagelineError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.stage.v1 import stage_service_pb2 as stage_pb
from stageline.stage.v1 import stage_service_pb2_grpc as stage_grpc
from tests.certificates import Authority
from tests.tiny import save_tiny, tiny_model

TOKEN = "7a" * 32


def cli(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *args], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


def arguments_of_all_processes() -> str:
    texts = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            texts.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(texts)


def test_everything_is_locked_and_nothing_secret_is_told(tmp_path):
    authority, internal = Authority("public"), Authority("internal")
    door = authority.issue(tmp_path / "door")
    inside = internal.issue(tmp_path / "inside")
    (tmp_path / "token").write_text(TOKEN)
    keys = str(tmp_path / "keys.yaml")
    key = cli("keys", "create", "--file", keys, "--tenant", "red").stdout.strip()
    Path(keys).write_text(Path(keys).read_text().replace("red:", "red:\n    operator: true"))
    config = {
        "model": {"path": str(save_tiny(tmp_path / "tiny", tiny_model())), "dtype": "float32"},
        "stages": {"count": 2},
        "kv_cache": {"num_blocks": 64},
        "server": {"grpc_port": 0, "http_port": 0},
        "security": {
            "certificate_file": door["certificate_file"], "key_file": door["key_file"], "keys_file": keys,
            "audit_file": str(tmp_path / "audit.jsonl"), "stage_token_file": str(tmp_path / "token"),
            "stage_server_name": "stage.test", **{f"stage_{name}": path for name, path in inside.items()},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "STAGELINE_API_KEY": key}
    with (tmp_path / "stderr.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve", "--config", str(tmp_path / "config.yaml")],
            stdout=subprocess.PIPE, stderr=log, text=True, env={**env, "STAGELINE_API_KEY": ""},
        )  # fmt: skip
    told = []
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        assert ready[:1] == ["ready"], (tmp_path / "stderr.txt").read_text()[-4000:]
        http, address = ready[1], ready[2].removeprefix("grpcs://")
        tls = Tls(root_certificates=authority.pem)
        with Client(address, tls=tls, api_key=key) as client:
            answer = client.generate(gen.Generation(text="a", stop=gen.StopConditions(max_tokens=5)), timeout_s=60)
            assert answer.usage.completion_tokens > 0
        with Client(address, tls=tls) as client, pytest.raises(StagelineError) as caught:
            client.get_model(timeout_s=10)
        assert caught.value.reason == "API_KEY_MISSING"
        with httpx.Client(base_url=http, verify=ssl.create_default_context(cafile=door["ca_file"])) as web:
            assert web.get("/readyz").status_code == 200
            assert web.get("/v1/models").status_code == 401
            assert web.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            told.append(web.get("/v1/models", headers={"authorization": f"Bearer x{key}"}).text)
        status = cli("status", "--address", address, "--ca-file", door["ca_file"], "--output", "json", env=env)
        [pipeline] = json.loads(status.stdout)["pipelines"]
        stage = pipeline["stages"][0]["replicas"][0]["address"]
        told += [status.stdout, cli("config", "--config", str(tmp_path / "config.yaml"), env=env).stdout]
        with grpc.insecure_channel(stage) as channel, pytest.raises(grpc.RpcError) as refused:
            stage_grpc.StageServiceStub(channel).Describe(stage_pb.DescribeRequest(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        told.append(arguments_of_all_processes())
        assert str(tmp_path / "config.yaml") in told[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    told += [(tmp_path / name).read_text() for name in ("stderr.txt", "audit.jsonl")]
    private = [
        line for file in ("door", "inside") for line in (tmp_path / file / "tls.key").read_text().splitlines()[1:-1]
    ]
    for secret in (key[16:], TOKEN, *private):
        for text in told:
            assert secret not in text
    reasons = [json.loads(line)["reason"] for line in told[-1].splitlines()]
    assert reasons.count("API_KEY_MISSING") == 2
    assert "API_KEY_WRONG" in reasons


def test_wrong_files_end_serve_at_once(tmp_path):
    folder = str(save_tiny(tmp_path / "tiny", tiny_model()))
    (tmp_path / "short").write_text("hunter2")
    for flag, says in (
        ("--security.keys-file", "SECURITY_FILE_UNREADABLE"),
        ("--security.stage-token-file", "TOKEN_INVALID"),
        ("--security.certificate-file", "TLS_INCOMPLETE"),
    ):
        value = str(tmp_path / ("missing" if "keys" in flag else "short"))
        began = time.monotonic()
        done = cli("serve", "--model", folder, flag, value)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert "hunter2" not in done.stderr
        assert "starting Ray" not in done.stderr, f"{time.monotonic() - began} s"
