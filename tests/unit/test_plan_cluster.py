"""`plan --cluster`: the real kubernetes client against a small API server over HTTP that answers with recorded nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from api_server import TOKEN, JsonHandler, running, write_kubeconfig

from gateway.cli import main


def node(name: str, product: str | None, count: int | None, memory_mib: int | None = None, **changes: Any) -> dict:
    """A node as `kubectl get --raw /api/v1/nodes` shows it (fields that play no part are left out)."""
    labels = {"kubernetes.io/hostname": name, "nvidia.com/gpu.present": "true"}
    if product is not None:
        labels["nvidia.com/gpu.product"] = product
    if memory_mib is not None:
        labels["nvidia.com/gpu.memory"] = str(memory_mib)
    allocatable = {"cpu": "63770m", "memory": "527936112Ki", "pods": "110"}
    if count is not None:
        allocatable["nvidia.com/gpu"] = str(count)
    return {
        "metadata": {"name": name, "labels": labels, "creationTimestamp": "2026-05-04T08:11:02Z"},
        "spec": {"providerID": f"example:///{name}", **changes.get("spec", {})},
        "status": {
            "allocatable": allocatable,
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": changes.get("ready", "True")},
            ],
        },
    }


NODES = [
    node("cpu-1", None, None),
    node("l40s-1", "NVIDIA-L40S", 2, 46068),
    node("a100-1", "NVIDIA-A100-SXM4-80GB", 2, 81920),
    node("a100-2", "NVIDIA-A100-80GB-PCIe", 2, 81920),
    node("a100-cordoned", "NVIDIA-A100-SXM4-80GB", 8, 81920, spec={"unschedulable": True}),
    node("a100-down", "NVIDIA-A100-SXM4-80GB", 8, 81920, ready="Unknown"),
    node("a100-mig", "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", 4, 40192),
    node("a100-odd", "NVIDIA-A100-SXM4-80GB", 1, 40960),
    node("unlabelled", None, 4),
    node("t4-1", "Tesla-T4", 4, 15360),
    node("broken", "NVIDIA-L40S", 0, 46068),
]


class ApiServer(ThreadingHTTPServer):
    """Answers GET /api/v1/nodes in pages of 4, to whoever has the token."""

    nodes: list[dict] = NODES
    status = 200
    also: dict[str, dict]
    requests: list[str]


class Handler(JsonHandler):
    server: ApiServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        url = urlsplit(self.path)
        if url.path in self.server.also:
            self.answer(200, self.server.also[url.path])
        elif url.path != "/api/v1/nodes" or self.server.status != 200:
            status = self.server.status if url.path == "/api/v1/nodes" else 404
            self.answer(status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status})
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 401})
        else:
            query = parse_qs(url.query)
            assert "limit" in query, "a large cluster must be read in pages"
            start = int(query.get("continue", ["0"])[0])
            rest = start + 4 < len(self.server.nodes)
            metadata = {"resourceVersion": "81532", **({"continue": str(start + 4)} if rest else {})}
            items = self.server.nodes[start : start + 4]
            self.answer(200, {"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items})


@pytest.fixture
def api(tmp_path: Path, monkeypatch) -> Iterator[ApiServer]:
    server = ApiServer(("127.0.0.1", 0), Handler)
    server.requests, server.also = [], {}
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with running(server, tmp_path / "kubeconfig"):
        yield server


def plan(capsys, *args: str) -> tuple[int, str, str]:
    code = main(["plan", "--cluster", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_cluster_is_planned_for_and_what_is_left_out_is_named(capsys, api: ApiServer) -> None:
    code, out, err = plan(capsys, "--model", "qwen2-72b", "--output", "json")
    assert code == 0
    stages = json.loads(out)["stages"]
    assert sorted(stage["gpu"] for stage in stages) == ["a100-80g"] * 4 + ["l40s-48g"] * 2
    assert len(api.requests) == 3
    for name, why in (
        ("a100-cordoned", "cordoned"),
        ("a100-down", "not ready"),
        ("a100-mig", "MIG-3g.40gb is not in the catalogue"),
        ("a100-odd", "nvidia.com/gpu.memory=40960"),
        ("unlabelled", "no label nvidia.com/gpu.product"),
        ("t4-1", "Tesla-T4 is not in the catalogue"),
    ):
        [line] = [line for line in err.splitlines() if f"node {name} " in line]
        assert why in line
    assert "cpu-1" not in err
    assert "broken" not in err


def test_what_the_manifests_need_and_the_cluster_lacks_is_said(capsys, api: ApiServer, tmp_path: Path) -> None:
    args = ("--model", "qwen2-72b", "--storage-class", "fast", "--output", "k8s", "--output-dir", str(tmp_path / "k8s"))
    code, out, err = plan(capsys, *args)
    assert code == 0
    assert out  # written all the same: both can be installed afterwards
    assert "no kind RayService: install the KubeRay operator" in err
    assert "no StorageClass fast: " in err
    ray = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "ray.io/v1", "resources": []}
    fast = {"kind": "StorageClass", "metadata": {"name": "fast"}, "provisioner": "example.com/files"}
    api.also = {"/apis/ray.io/v1": ray, "/apis/storage.k8s.io/v1/storageclasses/fast": fast}
    code, _, err = plan(capsys, *args)
    assert code == 0
    assert "no kind RayService" in err
    assert "StorageClass" not in err
    service = {
        "name": "rayservices",
        "singularName": "rayservice",
        "namespaced": True,
        "kind": "RayService",
        "verbs": ["get"],
    }
    api.also["/apis/ray.io/v1"] = ray | {"resources": [service]}
    code, _, err = plan(capsys, *args)
    assert code == 0
    assert "RayService" not in err


def test_no_gpu_that_could_serve(capsys, api: ApiServer) -> None:
    api.nodes = [NODES[0], NODES[9]]
    code, out, err = plan(capsys, "--model", "qwen2-72b")
    assert (code, out) == (1, "")
    assert "NO_GPU_NODES" in err
    assert "Tesla-T4" in err


@pytest.mark.parametrize(("status", "reason"), [(403, "NODES_FORBIDDEN"), (500, "API_SERVER_FAILED")])
def test_an_api_server_that_refuses(capsys, api: ApiServer, status: int, reason: str) -> None:
    api.status = status
    code, out, err = plan(capsys, "--model", "qwen2-72b")
    assert (code, out) == (1, "")
    assert reason in err
    assert str(status) in err


def test_a_wrong_token_an_absent_server_and_no_kubeconfig(capsys, api: ApiServer, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "kubeconfig"
    write_kubeconfig(path, f"http://127.0.0.1:{api.server_port}", token="wrong")
    assert "NODES_FORBIDDEN" in plan(capsys, "--model", "qwen2-72b")[2]
    write_kubeconfig(path, "http://127.0.0.1:1")
    assert "API_SERVER_UNREACHABLE" in plan(capsys, "--model", "qwen2-72b")[2]
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    code, _, err = plan(capsys, "--model", "qwen2-72b")
    assert code == 2
    assert "KUBECONFIG_UNUSABLE" in err


def test_no_kubeconfig_is_said(monkeypatch, capsys, tmp_path: Path) -> None:
    """On a machine that has none the client looks for a pod's service account, and there is none either."""
    import kubernetes.config.kube_config

    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kubernetes.config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert main(["plan", "--cluster", "--model", "qwen2-72b"]) == 2
    assert "set KUBECONFIG" in capsys.readouterr().err
