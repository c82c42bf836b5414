"""`stageline serve` as a user runs it: real Ray Serve, real processes, both doors, a killed stage, a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import torch

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from stageline.stage.v1 import stage_service_pb2 as stage_pb
from stageline.stage.v1.stage_service_pb2_grpc import StageServiceStub
from tests.parity.test_model import reference
from tests.tiny import save_tiny, tiny_model

PROMPT = [5, 77, 300, 12, 9, 9, 41]


def cli(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *args], capture_output=True, text=True, timeout=120, **kwargs
    )


@dataclass
class Server:
    process: subprocess.Popen[str]
    http: str
    grpc: str
    folder: Path


@contextmanager
def serving(root: Path, *flags: str) -> Iterator[Server]:
    """Three stages of a tiny model; what it says on stderr is in `root/stderr.txt`."""
    folder = save_tiny(root / "tiny", tiny_model())
    command = ["serve", "--model", str(folder), "--layers", "0-1,1-3,3-4", "--dtype", "float32", "--grpc-port", "0",
               "--http-port", "0", "--kv-cache.num-blocks", "64", *flags]  # fmt: skip
    with (root / "stderr.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", *command], stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(root)},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:1] == ["ready"], (root / "stderr.txt").read_text()[-4000:]
        yield Server(process, line[1].removeprefix("http://"), line[2].removeprefix("grpc://"), folder)
    finally:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), "--server.log-format", "json") as running:
        yield running


def generation(**stop) -> gen.Generation:
    return gen.Generation(
        token_ids=gen.TokenIds(ids=PROMPT),
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=40, ignore_eos=True, **stop),
    )


def stub(server: Server) -> InferenceServiceStub:
    return InferenceServiceStub(grpc.insecure_channel(server.grpc))


def pids(server: Server) -> list[int]:
    [pipeline] = stub(server).GetModel(pb.GetModelRequest()).pipelines
    return [replica.pid for stage in pipeline.stages for replica in stage.replicas]


def test_grpc_answers_what_transformers_answers(server: Server) -> None:
    answer = stub(server).Generate(pb.GenerateRequest(generation=generation()), timeout=60)
    assert list(answer.choices[0].token_ids) == reference(tiny_model(), PROMPT, 40)
    assert answer.choices[0].finish_reason == gen.FINISH_REASON_LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 40)


def test_status_shows_one_process_a_stage(server: Server) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(server.folder.parent)}
    for args in ((), ("--address", server.grpc)):
        data = json.loads(cli("status", "--output", "json", *args, env=env).stdout)
        [pipeline] = data["pipelines"]
        assert pipeline["state"] == "ready"
        assert [stage["layers"] for stage in pipeline["stages"]] == ["0-1", "1-3", "3-4"]
        found = [replica["pid"] for stage in pipeline["stages"] for replica in stage["replicas"]]
        assert len(set(found)) == 3
        assert all(Path(f"/proc/{pid}").exists() for pid in found)
        assert data["spares"] == []


def test_strangers_on_this_host_do_not_get_at_the_stages(server: Server) -> None:
    [pipeline] = stub(server).GetModel(pb.GetModelRequest()).pipelines
    for stage in pipeline.stages:
        with grpc.insecure_channel(stage.replicas[0].address) as channel, pytest.raises(grpc.RpcError) as caught:
            StageServiceStub(channel).Describe(stage_pb.DescribeRequest(), timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    [token] = (server.folder.parent / f"stageline-{os.getuid()}").glob("*.token")
    assert token.stat().st_mode & 0o777 == 0o600


def test_openai_client(server: Server) -> None:
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    extra = {"ignore_eos": True, "repetition_penalty": 1.0}
    whole = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2, extra_body=extra
    )
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True, extra_body=extra
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    with torch.no_grad():
        logprobs_V = torch.log_softmax(tiny_model()(torch.tensor([PROMPT])).logits[0, -1], dim=-1)
    assert whole.choices[0].logprobs.token_logprobs[0] == pytest.approx(float(logprobs_V.max()), abs=1e-4)
    messages = [{"role": "user", "content": "hello"}]
    seeded = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, seed=4, temperature=1.0, n=2)
        for _ in range(2)
    ]
    assert seeded[0].choices[0].message == seeded[1].choices[0].message
    assert seeded[0].choices[0].message != seeded[0].choices[1].message


@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        ("completions", b'{"prompt": "x", "temperature": -1}', 400, "temperature"),
        ("completions", b'{"prompt": "x", "top_p": 0}', 400, "top_p"),
        ("completions", b'{"prompt": "x", "frobnicate": 1}', 400, "frobnicate"),
        ("completions", b'{"prompt": [99999]}', 400, "99999"),
        ("completions", b'{"prompt": ""}', 400, "prompt"),
        ("completions", b'{"prompt": "x", "max_tokens": 512}', 400, "512"),
        ("completions", b'{"prompt": "x", "suffix": "y"}', 400, "suffix"),
        ("completions", b'{"prompt": "\xff"}', 400, "UTF-8"),
        ("completions", b'{"prompt": ', 400, "JSON"),
        ("chat/completions", b'{"messages": [{"role": "king", "content": "x"}]}', 400, "king"),
        ("chat/completions", b'{"messages": []}', 400, "messages"),
        ("completions", b'{"prompt": "x", "model": "gpt-9"}', 404, "gpt-9"),
    ],
)
def test_bad_input_is_named_and_harms_nobody(server: Server, path: str, body: bytes, status: int, names: str) -> None:
    answer = httpx.post(f"http://{server.http}/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert names in answer.json()["error"]["message"]


def test_a_client_that_leaves_gives_its_blocks_back(server: Server) -> None:
    def free() -> int:
        return stub(server).GetModel(pb.GetModelRequest()).pipelines[0].num_free_blocks

    before = free()
    message = generation()
    message.stop.max_tokens = 500
    call = stub(server).StreamGenerate(pb.StreamGenerateRequest(generation=message))
    for _, response in zip(range(4), call, strict=False):
        assert response is not None
    assert free() < before
    call.cancel()
    deadline = time.monotonic() + 5
    while free() != before:
        assert time.monotonic() < deadline, "blocks of a cancelled request were not given back"
        time.sleep(0.02)


def test_a_deadline_ends_the_request(server: Server) -> None:
    message = generation()
    message.stop.max_tokens = 500
    with pytest.raises(grpc.RpcError) as caught:
        stub(server).Generate(pb.GenerateRequest(generation=message), timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_killed_stage_costs_a_pause_and_no_token(server: Server) -> None:
    expected = reference(tiny_model(), PROMPT, 300)
    message = generation()
    message.stop.max_tokens = 300
    tokens: list[int] = []
    killed = False
    for response in stub(server).StreamGenerate(pb.StreamGenerateRequest(generation=message), timeout=120):
        tokens += [token for delta in response.choices for token in delta.token_ids]
        if len(tokens) >= 20 and not killed:
            killed = True
            os.kill(pids(server)[1], signal.SIGKILL)
    assert killed
    assert tokens == expected


def test_every_line_on_stderr_is_an_object(server: Server) -> None:
    name, prompt = "a-name-of-ours", "a prompt that nobody logs"
    body = {"prompt": prompt, "max_tokens": 3, "ignore_eos": True}
    headers = {"x-request-id": name}
    assert httpx.post(f"http://{server.http}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    [pipeline] = stub(server).GetModel(pb.GetModelRequest()).pipelines
    with grpc.insecure_channel(pipeline.stages[1].replicas[0].address) as channel, pytest.raises(grpc.RpcError):
        StageServiceStub(channel).Describe(stage_pb.DescribeRequest(), timeout=10)  # a stranger
    expected = {f'"request_id": "{name}"': 2, "calls without the stages' token": 1}
    deadline = time.monotonic() + 20  # lines of replicas come through Ray, now and then
    while any(
        (text := (server.folder.parent / "stderr.txt").read_text()).count(one) < n for one, n in expected.items()
    ):
        assert time.monotonic() < deadline, text[-2000:]
        time.sleep(0.1)
    # What Ray itself says of a process that was killed stays text.
    lines = [json.loads(line) for line in text.splitlines() if not line.startswith("(raylet) ")]
    for line in lines:
        assert {"time", "level", "logger", "message", "pid"} <= line.keys(), line
    assert lines[0]["message"] == "starting Ray"
    done, call = (line for line in lines if line.get("request_id") == name)
    assert (done["logger"], done["level"]) == ("stageline.gateway.requests", "INFO")
    assert done["message"].startswith(f"request {name}: done, ")
    assert (call["logger"], call["method"], call["status"]) == ("stageline.audit", "POST /v1/completions", "200")
    assert prompt not in text
    ready = [line for line in lines if " is ready in epoch " in line["message"]]
    assert (ready[-1]["pipeline"], ready[-1]["epoch"]) == (pipeline.id, pipeline.epoch)
    assert any(line["logger"] == "stageline.security" and line["layers"] == "1-3" for line in lines)


def test_sigterm_ends_everything_it_started(server: Server) -> None:
    started = pids(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--stages", "9"), "9 stages need at least as many layers"),
        (("--layers", "0-2,3-4"), "leaves a gap"),
        (("--layers", "0-3,2-4"), "overlaps"),
        (("--kv-cache.blocks", "2"), "unrecognized arguments"),
        (("--dtype", "int3"), "model.dtype"),
        (("--model.chat-template-file", "/nowhere/a.jinja"), "model.chat_template_file cannot be read"),
    ],
)
def test_serve_refuses_before_anything_starts(args, says: str, server: Server) -> None:
    done = cli("serve", "--model", str(server.folder), *args)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_serve_names_the_stage_whose_tensors_are_missing(tmp_path) -> None:
    folder = save_tiny(tmp_path / "broken")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    shard.write_bytes(shard.read_bytes()[:-100])
    done = cli("serve", "--model", str(folder), "--stages", "2")
    assert done.returncode == 2
    assert "stage 1" in done.stderr
    assert shard.name in done.stderr


def test_serve_names_a_stage_that_fails_while_it_starts(tmp_path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    done = cli("serve", "--model", str(folder), "--stages", "2", "--grpc-port", "0", "--http-port", "0",
               "--kv-cache.memory-bytes", "1000")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert re.match(r"stageline serve: stage [01] \(layers \d-\d\) cannot start: KV_CACHE_TOO_SMALL: 1000 bytes", last)
    # Ray's controller at times prints a failed start of its own accord, which nobody else can silence.
    ours = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("(ServeController"))
    assert "Traceback" not in ours
    assert "\r" not in done.stderr  # no bars where there is no terminal


def test_a_taken_port_and_a_missing_model_are_named(tmp_path) -> None:
    import socket

    folder = save_tiny(tmp_path / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = cli("serve", "--model", str(folder), "--grpc-port", port)
    assert (done.returncode, port in done.stderr) == (2, True)
    assert cli("serve").returncode == 2
    assert cli("serve", "--model", str(tmp_path / "nothing")).returncode == 2


def test_plan_counts_every_parameter(server: Server) -> None:
    done = cli("plan", "--model", str(server.folder), "--stages", "2", "--output", "json")
    plan = json.loads(done.stdout)
    assert sum(stage["parameters"] for stage in plan["stages"]) == sum(p.numel() for p in tiny_model().parameters())
