"""The application of k8s/30-rayservice.yaml, deployed on a local Ray by `serve deploy`, answers requests.

Ray is told that it has the cluster's GPUs and pods, so resources stay as they are; what is replaced is the model's folder
(tiny weights with 80 layers), the device (CPU) and the ports. Then the one with a spare is deployed over it, as an edit of
serveConfigV2 would be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manifest_files import find, planned, serve_config

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.ports import free_ports
from tests.ray_environment import RAY_ENVIRONMENT
from tests.tiny import save_tiny, tiny_model

HEAD = """
import json, sys, ray
ray.init(address="local", include_dashboard=True, dashboard_port=int(sys.argv[1]), object_store_memory=100_000_000,
         log_to_driver=False, **json.loads(sys.argv[2]))
print("ready", flush=True)
sys.stdin.read()
"""
SERVICE = "stageline.inference.v1.InferenceService"
START_S = 240
PROMPT = [5, 77, 300, 12, 9, 9, 41]
ENVIRONMENT = {**os.environ, **RAY_ENVIRONMENT}


@dataclass
class Deployed:
    """An application on a local Ray. `replaced` are the arguments that are not the cluster's."""

    grpc: str
    http: str
    config: dict[str, Any]
    replaced: dict[str, dict[str, Any]]
    dashboard: str
    root: Path

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy`, and wait until it serves."""
        self.config = config
        for section, fields in self.replaced.items():
            config["applications"][0]["args"][section] |= fields
        url = httpx.URL(self.http)
        config["http_options"] |= {"host": url.host, "port": url.port}
        (self.root / "serve.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(self.root / "serve.yaml")]
        done = subprocess.run(
            [*command, "--address", self.dashboard], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr
        wait_until_running(self.dashboard)
        wait_until_serving(self.grpc)

    def model(self) -> pb.GetModelResponse:
        with grpc.insecure_channel(self.grpc) as channel:
            return InferenceServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=20)

    def generate(self, max_tokens: int) -> pb.GenerateResponse:
        """Greedy."""
        generation = gen.Generation(
            token_ids=gen.TokenIds(ids=PROMPT),
            sampling=gen.SamplingParams(temperature=0),
            stop=gen.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        with grpc.insecure_channel(self.grpc) as channel:
            request = pb.GenerateRequest(generation=generation)
            return InferenceServiceStub(channel).Generate(request, timeout=60)


def cluster_resources(service: dict[str, Any]) -> dict[str, Any]:
    """What all worker pods have together, as arguments of `ray.init`."""
    total: dict[str, Any] = {"num_cpus": 0.0, "num_gpus": 0.0, "resources": {}}
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        total["num_cpus"] += float(group["rayStartParams"]["num-cpus"]) * group["replicas"]
        total["num_gpus"] += float(limits.get("nvidia.com/gpu", 0)) * group["replicas"]
        for name, amount in json.loads(json.loads(group["rayStartParams"]["resources"])).items():
            total["resources"][name] = total["resources"].get(name, 0) + amount * group["replicas"]
    return total


@pytest.fixture(scope="module")
def with_spare(tmp_path_factory) -> dict[str, Any]:
    return find(planned(tmp_path_factory.mktemp("spare"), "--stages.spares", "1"), "RayService")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, ray_service, with_spare) -> Iterator[Deployed]:
    root = tmp_path_factory.mktemp("deploy")
    small = tiny_model(
        num_hidden_layers=80, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    )
    model = save_tiny(root / "tiny", small)
    (root / "token").write_text("0" * 64)
    dashboard, grpc_port, http_port = free_ports(3)
    replaced: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "stages": {"device": "cpu"},
        "security": {"stage_token_file": str(root / "token")},
        "server": {"host": "127.0.0.1", "grpc_port": grpc_port},
    }
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(dashboard), json.dumps(cluster_resources(with_spare))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        while (line := head.stdout.readline().strip()) != "ready":
            assert line or head.poll() is None, "Ray did not start"
        here = Deployed(
            grpc=f"127.0.0.1:{grpc_port}", http=f"http://127.0.0.1:{http_port}", config={}, replaced=replaced,
            dashboard=f"http://127.0.0.1:{dashboard}", root=root,
        )  # fmt: skip
        here.deploy(serve_config(ray_service))
        yield here
    finally:
        assert head.stdin is not None
        head.stdin.close()  # the head's process ends, and with it everything that Ray started
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            head.kill()


def wait_until_running(address: str) -> None:
    deadline = time.monotonic() + START_S
    state: Any = None
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{address}/api/serve/applications/", timeout=60) as answer:
            state = json.load(answer)["applications"].get("stageline", {})
        if state.get("status") == "RUNNING":
            return
        assert state.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), state["message"]
        time.sleep(0.3)
    pytest.fail(f"the application is not running after {START_S} s: {state}")


def wait_until_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.1)
    pytest.fail("no pipeline is ready")


@pytest.mark.timeout(400)
def test_the_pipeline_is_the_planned_one(deployed: Deployed) -> None:
    model = deployed.model()
    args = deployed.config["applications"][0]["args"]
    assert model.name == args["model"]["name"] == "Qwen2-72B"
    [pipeline] = model.pipelines
    assert ",".join(stage.layers for stage in pipeline.stages) == args["stages"]["layers"]
    assert pipeline.num_blocks == args["kv_cache"]["num_blocks"]
    assert len(set(pids(model))) == len(pipeline.stages) == 4
    assert not model.spares


@pytest.mark.timeout(120)
def test_both_doors_answer_the_same(deployed: Deployed) -> None:
    answer = deployed.generate(8)
    [choice] = answer.choices
    assert len(choice.token_ids) == answer.usage.completion_tokens == 8
    assert choice.finish_reason == gen.FINISH_REASON_LENGTH
    body = {"model": "Qwen2-72B", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{deployed.http}/v1/completions", json=body, timeout=60).json()
    assert reply["choices"][0]["text"] == choice.text
    assert reply["usage"]["completion_tokens"] == 8


@pytest.mark.timeout(300)
def test_with_a_spare_it_deploys_too_and_the_spare_takes_a_lost_stage(deployed: Deployed, with_spare) -> None:
    before = deployed.generate(8)
    deployed.deploy(serve_config(with_spare))
    deadline = time.monotonic() + 120
    while not (spares := deployed.model().spares):
        assert time.monotonic() < deadline, "no spare"
        time.sleep(0.1)
    [spare] = spares
    assert (spare.state, spare.layers) == ("unbound", "any")
    os.kill(pids(deployed.model())[1], signal.SIGKILL)  # the stage with most bytes
    assert deployed.generate(8).choices == before.choices
    assert pids(deployed.model())[1] == spare.pid


def pids(model: pb.GetModelResponse) -> list[int]:
    """Of the one pipeline's stages, in order."""
    [pipeline] = model.pipelines
    return [replica.pid for stage in pipeline.stages for replica in stage.replicas]
