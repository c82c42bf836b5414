"""The batch job's manifest: KubeRay's rules for RayJobs, who may talk to whom, and that its command is one we have."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from manifest_files import K8S, find, planned, pod_templates, pods_with_labels, read_manifests, selects, serve_config
from pod_security import violations
from schemas import errors_of

from gateway.batch.dataset.command import add_arguments
from gateway.planner.batch_job import BatchJob, batch_job
from gateway.planner.k8s import Deployment
from stageline.errors import ConfigError

SUBMITTER_RULES = [
    {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list", "watch", "delete"]},
    {"apiGroups": ["ray.io"], "resources": ["rayjobs/status"], "verbs": ["get"]},
]


@pytest.fixture(scope="module")
def job(manifests) -> dict[str, Any]:
    return find(manifests, "RayJob")


def command_of(job: dict[str, Any]) -> Any:
    import argparse

    python, module, name, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, module, name) == ("python", "-m", "gateway.batch.dataset")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_kuberays_rules(job, ray_service) -> None:
    import ray

    spec = job["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert len(job["metadata"]["name"]) <= 47
    assert "generateName" not in job["metadata"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["backoffLimit"] > 0
    assert "clusterSelector" not in spec
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == ray_service["spec"]["rayClusterConfig"]["authOptions"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for name, template in pod_templates([job]):
        container = template["spec"]["containers"][0]
        assert "nvidia.com/gpu" not in str(container["resources"]), name
        assert template["spec"]["automountServiceAccountToken"] is False
        if not name.endswith("submitter"):
            assert container["resources"]["requests"] == container["resources"]["limits"]
    [group] = cluster["workerGroupSpecs"]
    cpus = int(group["rayStartParams"]["num-cpus"])
    assert cpus >= 2  # a runner, and reading beside it
    assert cpus <= int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])


def test_the_entrypoint_is_a_command_of_ours_to_the_serve_service(job, ray_service) -> None:
    args = command_of(job)
    assert args.address == f"http://{ray_service['metadata']['name']}-serve-svc:8000"
    assert serve_config(ray_service)["http_options"]["port"] == 8000
    mounts = {mount["mountPath"] for _, t in pod_templates([job]) for c in t["spec"]["containers"]
              for mount in c.get("volumeMounts", ())}  # fmt: skip
    assert args.input.startswith("/data/")
    assert args.output_file.startswith("/data/")
    assert "/data" in mounts


def test_the_submitter_may_do_what_it_needs_and_nothing_else(manifests) -> None:
    role = find(manifests, "Role", "stageline-batch-submitter")
    assert role["rules"] == SUBMITTER_RULES
    binding = find(manifests, "RoleBinding", "stageline-batch-submitter")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    [subject] = binding["subjects"]
    account = find(manifests, "ServiceAccount", subject["name"])
    assert subject["namespace"] == account["metadata"]["namespace"] == role["metadata"]["namespace"]


def test_who_may_talk_to_whom(manifests) -> None:
    """Policies as a cluster applies them: traffic passes where an egress and an ingress rule allow it."""
    policies = [item["spec"] for item in manifests if item["kind"] == "NetworkPolicy"]
    pods = {name: labels for name, _, labels in pods_with_labels(manifests)}

    def allowed(source: str, target: str, port: int) -> bool:
        def passes(direction: str, at: dict[str, str], other: dict[str, str]) -> bool:
            peers, rules = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
            for policy in policies:
                if direction not in policy["policyTypes"] or not selects(policy["podSelector"], at):
                    continue
                for rule in policy.get(rules, ()):
                    wanted = [p["podSelector"] for p in rule.get(peers, ()) if "namespaceSelector" not in p]
                    peer = peers not in rule or any(selects(selector, other) for selector in wanted)
                    if peer and ("ports" not in rule or port in [one["port"] for one in rule["ports"]]):
                        return True
            return False

        return passes("Egress", pods[source], pods[target]) and passes("Ingress", pods[target], pods[source])

    head, runner, submitter = (f"RayJob/stageline-batch {name}" for name in ("head", "runner", "submitter"))
    gateway, stage = "RayService/stageline gateway", "RayService/stageline gpu-a100-80g"
    for source in (head, runner):
        assert allowed(source, gateway, 8000)  # Serve's proxies are where its replicas are
        assert allowed(source, stage, 8000)
        assert not allowed(source, stage, 40000)
        assert not allowed(source, gateway, 40000)
        assert not allowed(gateway, source, 40000)
    assert allowed(head, runner, 40000)
    assert allowed(runner, head, 6379)
    assert allowed(submitter, head, 8265)
    assert not allowed(submitter, head, 6379)
    assert not allowed(submitter, gateway, 8000)
    assert not allowed(submitter, "RayService/stageline head", 8265)
    assert allowed(gateway, stage, 40000)
    assert allowed(stage, "RayService/stageline head", 6379)
    assert allowed("RayService/stageline head", "StatefulSet/stageline-redis", 6379)
    assert not allowed(head, "StatefulSet/stageline-redis", 6379)


@pytest.mark.parametrize(
    ("given", "output", "volume"),
    [
        ("s3://bucket/sets/", "s3://bucket/out.parquet", False),
        ("/data/in.jsonl", "gs://bucket/out.jsonl", True),
    ],
)
def test_the_jobs_of_the_command_line_are_valid_too(given: str, output: str, volume: bool) -> None:
    deployment = Deployment(namespace="llm", image="registry.example:5000/team/stageline")
    errors = "s3://bucket/bad.jsonl"
    made = batch_job(BatchJob(input=given, output=output, errors=errors, queue="q", workers=3, deployment=deployment))
    assert errors_of(made) == []
    for name, template in pod_templates([made]):
        assert violations(template["spec"]) == [], name
        volumes = {one["name"] for one in template["spec"].get("volumes", ())}
        mounted = {one["name"] for one in template["spec"]["containers"][0].get("volumeMounts", ())}
        assert volumes == mounted
        assert ("data" in volumes) == (volume and not name.endswith("submitter"))
    args = command_of(made)
    assert (args.input, args.output_file, args.error_file, args.workers) == (given, output, errors, 3)
    assert len(made["metadata"]["name"]) <= 47
    again = batch_job(BatchJob(input=given, output=output, errors=errors))
    assert again["metadata"]["name"] == made["metadata"]["name"]  # of the places alone
    other = batch_job(BatchJob(input=given, output=output, errors="s3://bucket/other.jsonl"))
    assert other["metadata"]["name"] != made["metadata"]["name"]


def test_names_that_kuberay_refuses() -> None:
    for name in ("1-batch", "x" * 48, "a_b", "-a", "a-"):
        with pytest.raises(ConfigError, match="name"):
            batch_job(BatchJob(input="s3://b/i.jsonl", output="s3://b/o.jsonl", errors="s3://b/e.jsonl", name=name))


def test_the_file_is_the_planners_for_other_names(tmp_path: Path) -> None:
    objects = planned(tmp_path, "--namespace", "llm", "--image", "registry.example/stageline", "--storage-class", "nfs")
    made = find(objects, "RayJob")
    assert made["metadata"]["namespace"] == "llm"
    assert find(objects, "PersistentVolumeClaim", "stageline-batch")["spec"]["storageClassName"] == "nfs"
    assert read_manifests((K8S / "jobs" / "batch-rayjob.yaml").read_text())[1]["kind"] == "RayJob"
    for _, template in pod_templates([made]):
        assert template["spec"]["containers"][0]["image"] == "registry.example/stageline:0.1.0-cpu"
