"""`batch … --kubernetes`: the real kubernetes client against a small API server over HTTP that keeps RayJobs as the real one
does, KubeRay's part in their status included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from api_server import TOKEN, JsonHandler, running

from gateway.cli import batch_cluster, main

RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "entrypoint failed"}
PLACES = ("s3://bucket/in.parquet", "--output-file", "s3://bucket/out.jsonl")


class ApiServer(ThreadingHTTPServer):
    """`script`: what KubeRay reports of a job, one status a read, None where it is deleted by somebody; the last stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.script: list[dict[str, str] | None] = [{}, RUNNING, SUCCEEDED]
        self.namespaces, self.has_crd, self.verbs = {"stageline"}, True, {"get", "list", "create", "delete"}
        self.failures = 0  # answers 500 so many times
        self.created: list[dict[str, Any]] = []
        self.seen: list[str] = []


class Handler(JsonHandler):
    server: ApiServer

    def do_GET(self) -> None:
        self._serve(lambda name: self._get(name) if name else self._list(), lambda name: "get" if name else "list")

    def do_POST(self) -> None:
        self._serve(lambda name: self._create(), lambda name: "create")

    def do_DELETE(self) -> None:
        self._serve(self._delete, lambda name: "delete")

    def _serve(self, action: Any, verb_of: Any) -> None:
        server, url = self.server, urlsplit(self.path)
        server.seen.append(f"{self.command} {self.path}")
        parts = url.path.strip("/").split("/")
        if server.failures:
            server.failures -= 1
            return self._status(500, "InternalError", "etcd is away", {})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._status(401, "Unauthorized", "Unauthorized", {})
        if parts[:4] != ["apis", "ray.io", "v1", "namespaces"] or parts[5] != "rayjobs" or not server.has_crd:
            return self.answer(404, b"404 page not found\n")
        self.namespace, name = parts[4], (parts[6] if len(parts) > 6 else "")
        if (verb := verb_of(name)) not in server.verbs:
            text = f'rayjobs.ray.io is forbidden: User "me" cannot {verb} resource "rayjobs"'
            return self._status(403, "Forbidden", text, {"group": "ray.io", "kind": "rayjobs"})
        return action(name)

    def _get(self, name: str) -> None:
        job = self.server.jobs.get(name)
        if job is None or self.namespace not in self.server.namespaces:
            return self._absent(name)
        if "deletionTimestamp" in job["metadata"]:
            del self.server.jobs[name]  # its cluster has gone meanwhile
        elif job["script"]:
            job["status"] = job["script"].pop(0)
            if job["status"] is None:
                del self.server.jobs[name]
                return self._absent(name)
        return self.answer(200, {key: value for key, value in job.items() if key != "script"})

    def _list(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        wanted = dict(part.split("=") for part in query["labelSelector"][0].split(","))
        assert int(query["limit"][0]) <= 500
        found = [job for job in self.server.jobs.values() if wanted.items() <= job["metadata"]["labels"].items()]
        return self.answer(200, {"kind": "RayJobList", "apiVersion": "ray.io/v1", "metadata": {}, "items": found})

    def _create(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["metadata"]["name"]
        if self.namespace not in self.server.namespaces:
            details = {"name": self.namespace, "kind": "namespaces"}
            return self._status(404, "NotFound", f'namespaces "{self.namespace}" not found', details)
        assert job["metadata"]["namespace"] == self.namespace
        if name in self.server.jobs:
            return self._status(409, "AlreadyExists", "already exists", {"name": name, "kind": "rayjobs"})
        self.server.created.append(json.loads(json.dumps(job)))
        job["metadata"]["creationTimestamp"] = f"2026-11-30T00:00:{len(self.server.created):02}Z"
        self.server.jobs[name] = {**job, "status": {}, "script": list(self.server.script)}
        return self.answer(201, job)

    def _delete(self, name: str) -> None:
        if name not in self.server.jobs:
            return self._absent(name)
        job = self.server.jobs[name]
        job["metadata"]["deletionTimestamp"] = "2026-11-30T01:00:00Z"
        return self.answer(200, {key: value for key, value in job.items() if key != "script"})

    def _absent(self, name: str) -> None:
        text = f'rayjobs.ray.io "{name}" not found'
        return self._status(404, "NotFound", text, {"name": name, "group": "ray.io", "kind": "rayjobs"})

    def _status(self, code: int, reason: str, message: str, details: dict[str, str]) -> None:
        self.answer(code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason,
                          "details": details, "code": code})  # fmt: skip


@pytest.fixture
def api(tmp_path: Path, monkeypatch) -> Iterator[ApiServer]:
    server = ApiServer()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(batch_cluster, "POLL_S", 0.02)
    with running(server, tmp_path / "kubeconfig"):
        yield server


def batch(capsys, verb: str, *args: str) -> tuple[int, str, str]:
    code = main(["batch", verb, *args, "--kubernetes"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_job_is_created_followed_and_found_again(capsys, api: ApiServer) -> None:
    code, out, err = batch(capsys, "submit", *PLACES, "--wait", "--output", "json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["status"] == "completed"
    assert (shown["input"], shown["output"]) == ("s3://bucket/in.parquet", "s3://bucket/out.jsonl")
    assert shown["errors"] == "s3://bucket/out.errors.jsonl"
    [manifest] = api.created
    assert manifest["metadata"]["name"] == shown["id"]
    assert manifest["spec"]["entrypoint"] == (
        "python -m gateway.batch.dataset s3://bucket/in.parquet --output-file s3://bucket/out.jsonl --error-file "
        "s3://bucket/out.errors.jsonl --address http://stageline-serve-svc:8000 --concurrency 64 --workers 1"
    )
    # The same command again is the same job; other files are another.
    assert json.loads(batch(capsys, "submit", *PLACES, "--output", "json")[1])["id"] == shown["id"]
    assert len(api.created) == 1
    other = json.loads(batch(capsys, "submit", PLACES[0], "--output-file", "s3://b/2.jsonl", "--output", "json")[1])
    assert (other["status"], other["id"] != shown["id"]) == ("in_progress", True)
    listed = json.loads(batch(capsys, "list", "--output", "json")[1])["data"]
    assert [one["id"] for one in listed] == [other["id"], shown["id"]]
    assert json.loads(batch(capsys, "list", "--limit", "1", "--output", "json")[1])["data"] == listed[:1]
    assert json.loads(batch(capsys, "get", shown["id"], "--output", "json")[1])["status"] == "completed"
    assert not [
        line for line in api.seen if not line.split("?")[0].split()[1].startswith("/apis/ray.io/v1/namespaces/")
    ]


def test_progress_and_an_api_server_that_is_away_for_a_while(capsys, api: ApiServer, monkeypatch) -> None:
    code, _, _ = batch(capsys, "submit", *PLACES)
    assert code == 0
    [name] = api.jobs
    real = batch_cluster.RayJobs.get

    def get(self, name: str):
        if api.failures == 0 and len(api.seen) == 4:
            api.failures = 3
        return real(self, name)

    monkeypatch.setattr(batch_cluster.RayJobs, "get", get)
    code, out, err = batch(capsys, "submit", *PLACES, "--wait")
    assert code == 0, err
    assert f"{name}  in_progress  Running/RUNNING" in err
    assert out.split()[:2] == [name, "completed"]


def test_a_job_that_failed_exits_1_and_is_made_anew_by_the_same_command(capsys, api: ApiServer) -> None:
    api.script = [RUNNING, FAILED]
    code, out, _ = batch(capsys, "submit", *PLACES, "--wait")
    assert code == 1
    assert "AppFailed entrypoint failed" in out
    api.script = [RUNNING, SUCCEEDED]
    code, out, err = batch(capsys, "submit", *PLACES, "--wait")
    assert code == 0, err
    assert "made anew" in err
    assert len(api.created) == 2
    assert api.created[0] == api.created[1]


def test_cancel_and_submit_again(capsys, api: ApiServer) -> None:
    batch(capsys, "submit", *PLACES)
    [name] = api.jobs
    code, out, _ = batch(capsys, "cancel", name, "--output", "json")
    assert (code, json.loads(out)["status"]) == (0, "cancelling")
    assert any(line.startswith("DELETE") and "propagationPolicy=Foreground" in line for line in api.seen)
    code, _, err = batch(capsys, "get", name)
    assert (code, "BATCH_NOT_FOUND" in err) == (1, True)
    code, _, err = batch(capsys, "cancel", name)
    assert (code, "BATCH_NOT_FOUND" in err) == (1, True)
    assert batch(capsys, "submit", *PLACES, "--wait")[0] == 0
    assert batch(capsys, "list")[0] == 0


def test_a_job_that_is_deleted_while_it_is_followed(capsys, api: ApiServer) -> None:
    api.script = [RUNNING, RUNNING, None]
    code, out, _ = batch(capsys, "submit", *PLACES, "--wait")
    assert (code, "cancelling" in out) == (1, True)


def test_flags_reach_the_job(capsys, api: ApiServer) -> None:
    api.namespaces.add("llm")
    code, _, err = batch(
        capsys, "submit", "/data/sets/", "--output-file", "/data/out.parquet", "--error-file", "gs://b/bad.jsonl",
        "--name", "nightly", "--namespace", "llm", "--image", "registry.example/team/stageline", "--volume-claim", "sets",
        "--queue", "stageline-batch", "--workers", "3", "--concurrency", "256", "--address", "http://other:8000",
    )  # fmt: skip
    assert code == 0, err
    [job] = api.created
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("nightly", "llm")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "stageline-batch"
    assert job["spec"]["entrypoint"].endswith("--address http://other:8000 --concurrency 256 --workers 3")
    cluster = job["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (3, 3, 3)
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in template["spec"]["volumes"]
            if len(v) == 2 and "persistentVolumeClaim" in v
        ]
        assert claims == ["sets"]
        assert template["spec"]["containers"][0]["image"].startswith("registry.example/team/stageline:")
    code, _, err = batch(capsys, "submit", *PLACES, "--name", "nightly", "--namespace", "llm")
    assert (code, "NAME_TAKEN" in err) == (2, True)


def test_urls_alone_need_no_volume(capsys, api: ApiServer) -> None:
    assert batch(capsys, "submit", *PLACES)[0] == 0
    assert "persistentVolumeClaim" not in json.dumps(api.created)
    assert '"mountPath": "/data"' not in json.dumps(api.created)


@pytest.mark.parametrize(
    ("change", "verb", "reason", "says"),
    [
        ({"has_crd": False}, "submit", "RAYJOB_CRD_MISSING", "install the KubeRay operator"),
        ({"has_crd": False}, "list", "RAYJOB_CRD_MISSING", "install the KubeRay operator"),
        ({"namespaces": {"default"}}, "submit", "NAMESPACE_NOT_FOUND", "--namespace"),
        ({"verbs": {"get"}}, "submit", "RAYJOBS_FORBIDDEN", "Role stageline-batch-submitter"),
        ({"verbs": set()}, "list", "RAYJOBS_FORBIDDEN", "refuses to list rayjobs in namespace stageline"),
    ],
)
def test_what_the_api_server_refuses(capsys, api: ApiServer, change, verb, reason, says) -> None:
    for name, value in change.items():
        setattr(api, name, value)
    code, out, err = batch(capsys, verb, *(PLACES if verb == "submit" else ()))
    assert (code, out) == (2, "")
    assert reason in err
    assert says in err
    assert api.created == []


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((*PLACES, "--name", "x" * 48), "NAME_TOO_LONG"),
        ((*PLACES, "--name", "Nightly"), "NAME_INVALID"),
        ((*PLACES, "--namespace", "a_b"), "NAME_INVALID"),
        ((*PLACES, "--queue", "a b"), "NAME_INVALID"),
        ((*PLACES, "--workers", "0"), "CONFIG_INVALID"),
        ((*PLACES, "--window-s", "5"), "CONFIG_INVALID"),
        ((*PLACES, "--tls"), "CONFIG_INVALID"),
        ((*PLACES, "--address", "127.0.0.1:9000"), "ADDRESS_INVALID"),
        (("in.jsonl", "--output-file", "/data/out.jsonl"), "PLACE_NOT_IN_CLUSTER"),
        (("/data/../etc/in.jsonl", "--output-file", "/data/out.jsonl"), "PLACE_NOT_IN_CLUSTER"),
        (("s3://b/in.jsonl", "--output-file", "out.jsonl"), "PLACE_NOT_IN_CLUSTER"),
        (("s3://b/in file.jsonl", "--output-file", "s3://b/out.jsonl"), "PLACE_INVALID"),
        (("s3://b/$(id).jsonl", "--output-file", "s3://b/out.jsonl"), "PLACE_INVALID"),
        (("s3://b/in.jsonl", "--output-file", "s3://b/out.csv"), "OUTPUT_SUFFIX_UNKNOWN"),
        (("s3://b/in.jsonl", "--output-file", "s3://b/in.jsonl"), "OUTPUT_IS_INPUT"),
    ],
)
def test_a_wrong_command_asks_nobody(capsys, api: ApiServer, args, reason) -> None:
    code, out, err = batch(capsys, "submit", *args)
    assert (code, out) == (2, "")
    assert reason in err
    assert api.seen == []


def test_flags_of_the_cluster_without_it(capsys) -> None:
    assert main(["batch", "list", "--namespace", "x", "--address", "127.0.0.1:1"]) == 2
    assert "--namespace belongs to --kubernetes" in capsys.readouterr().err


def test_no_cluster(capsys, api: ApiServer, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    code, _, err = batch(capsys, "submit", *PLACES)
    assert (code, "KUBECONFIG_UNUSABLE" in err) == (2, True)
    assert "--kubernetes" in err
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (tmp_path / "away").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "away"))
    code, _, err = batch(capsys, "list")
    assert (code, "API_SERVER_UNREACHABLE" in err) == (1, True)
