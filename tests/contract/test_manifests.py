"""k8s/ without a cluster: strict schemas, Pod Security, KubeRay's own rules, references, and where it comes from."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_files import (
    DEFAULT,
    K8S,
    find,
    planned,
    pod_templates,
    pods_with_labels,
    read_manifests,
    selects,
    serve_config,
)
from pod_security import violations
from schemas import errors_of, serve_config_errors

from gateway import config as configuration
from gateway.cli import main
from gateway.metrics import Metrics
from gateway.planner.catalogue import find_model_config
from gateway.planner.split import resolve_layers

# What a user makes before the first apply, as k8s/README.md says: (Secret, key).
SECRETS = {("stageline-redis", "password"), ("stageline-ray-auth", "auth_token"), ("stageline-hub", "token"),
           ("stageline-stages", "token")}  # fmt: skip
CLUSTER_SCOPED = {"Namespace", "ResourceFlavor", "ClusterQueue"}
OWNED_BY_KUBERAY = re.compile(r"app\.kubernetes\.io/(name|created-by)|ray\.io/.*")


def test_the_committed_manifests_are_the_planners(tmp_path: Path, capsys) -> None:
    assert main([*DEFAULT, "--output-dir", str(tmp_path)]) == 0
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.yaml")}
    committed = {str(path.relative_to(K8S)): path.read_text() for path in K8S.rglob("*.yaml")}
    assert written == committed, "run: stageline " + " ".join(DEFAULT) + " --output-dir k8s"
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / name) for name in sorted(written, key=lambda n: ("/" in n, n))
    ]
    assert main(list(DEFAULT)) == 0
    assert read_manifests(capsys.readouterr().out) == [
        item
        for name in sorted(committed, key=lambda n: ("/" in n, n))
        # Not kinds that a cluster may not have, and no job that waits for an input.
        if not name.startswith("optional/") and name != "jobs/batch-rayjob.yaml"
        for item in read_manifests(committed[name])
    ]


def test_the_namespace_comes_first_and_kubectl_takes_the_whole_folder() -> None:
    names = sorted(path.name for path in K8S.iterdir() if path.suffix in (".yaml", ".yml", ".json"))
    assert all(re.fullmatch(r"[0-9]{2}-[a-z-]+\.yaml", name) for name in names)
    assert [item["kind"] for item in read_manifests((K8S / names[0]).read_text())] == ["Namespace"]
    assert "kustomization.yaml" not in names


@pytest.mark.parametrize(
    "args", [(), ("--spare-gpus", "1", "--namespace", "llm", "--image", "registry.example:5000/team/stageline")]
)
def test_every_object_passes_strict_validation(tmp_path: Path, args: tuple[str, ...]) -> None:
    for item in planned(tmp_path, *args):
        assert errors_of(item) == [], item["metadata"]["name"]
        assert item["kind"] in CLUSTER_SCOPED or item["metadata"]["namespace"] == ("llm" if args else "stageline")
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "stageline"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 1, "minReplica"), 1),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 1, "replicas"), "four"),
        ("RayService", ("spec", "serveConfig"), ""),
        ("RayService", ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "prots"), []),
        ("RayService", ("spec", "rayClusterConfig", "authOptions", "mode"), "tokens"),
        ("RayJob", ("spec", "backofLimit"), 1),
        ("RayJob", ("spec", "entrypoint"), ["python"]),
        ("RayJob", ("spec", "submitterPodTemplate", "spec", "containers", 0, "imag"), "x"),
        ("RayJob", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "rayStartParam"), {}),
        ("Role", ("rules", 0, "verb"), ["get"]),
        ("Service", ("spec", "ports", 0, "appProtocl"), "x"),
        ("PodDisruptionBudget", ("spec", "minAvailable"), {"a": 1}),
        ("Job", ("spec", "template", "spec", "restartPolcy"), "Never"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "prot"), "metrics"),
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavors", 0, "resources", 0, "quota"), 1),
        ("Certificate", ("spec", "privateKey", "size"), "256"),
    ],
)
def test_validation_catches_mistakes(manifests, kind: str, path: tuple[Any, ...], value: Any) -> None:
    item = copy.deepcopy(next(m for m in manifests if m["kind"] == kind))
    place = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert errors_of(item)


def test_pods_pass_restricted(manifests) -> None:
    templates = dict(pod_templates(manifests))
    assert len(templates) == 8
    for name, template in templates.items():
        assert violations(template["spec"]) == [], name
    autoscaler = find(manifests, "RayService")["spec"]["rayClusterConfig"]["autoscalerOptions"]
    head = templates["RayService/stageline head"]["spec"]
    sidecar = {"name": "autoscaler", "securityContext": autoscaler["securityContext"]}
    assert violations({**head, "containers": [*head["containers"], sidecar]}) == []
    assert find(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]},
        {"securityContext": {"runAsNonRoot": True}},
        {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, "runAsUser": 0}},
        {"containers": [{"name": "x"}]},
        {"containers": [{"name": "x", "securityContext": {"allowPrivilegeEscalation": False}}]},
        {"initContainers": [{"name": "x", "securityContext": {"privileged": True}}]},
    ],
)
def test_restricted_is_checked(manifests, change: dict[str, Any]) -> None:
    spec = copy.deepcopy(find(manifests, "Job")["spec"]["template"]["spec"])
    for container in spec["containers"]:
        container["securityContext"].pop("seccompProfile")
        container["securityContext"].pop("runAsNonRoot")
    assert violations(spec) == []
    assert violations({**spec, **change})


def test_serve_config_is_what_ray_and_the_gateway_take(ray_service) -> None:
    data = serve_config(ray_service)
    assert serve_config_errors(data) == []
    for at, key in ((data, "http_option"), (data["applications"][0], "import_pth"),
                    (data["applications"][0]["deployments"][0], "num_replica"),
                    (data["applications"][0]["deployments"][0]["ray_actor_options"], "num_gpu")):  # fmt: skip
        at[key] = {}
        assert serve_config_errors(data)
        del at[key]
    data["applications"][0]["args"]["stages"]["layer"] = "0-80"
    with pytest.raises(configuration.ConfigError, match="layer"):
        serve_config_errors(data)


def test_serve_config_and_groups_agree(ray_service) -> None:
    """Every stage finds a pod with its GPU; nothing asks for more than a pod has."""
    data = serve_config(ray_service)
    [application] = data["applications"]
    config = configuration.from_mapping(application["args"], source="args")
    layers = resolve_layers(find_model_config("qwen2-72b"), None, config.stages.layers)
    assert len(layers[3]) < min(len(r) for r in layers[:3])
    deployments = {d["name"]: d["ray_actor_options"] for d in application["deployments"]}
    assert deployments.keys() == {"gateway", *(f"stage-{i}" for i in range(len(layers)))}
    free: list[dict[str, float]] = []
    for group in ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
        pod = {
            "num_cpus": float(group["rayStartParams"]["num-cpus"]),
            "num_gpus": float(limits.get("nvidia.com/gpu", 0)),
        }
        assert pod["num_cpus"] <= float(limits["cpu"])
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        free += [{**pod, **custom} for _ in range(group["replicas"])]
    for name, options in deployments.items():
        wanted = {"num_cpus": options["num_cpus"], "num_gpus": options.get("num_gpus", 0), **options["resources"]}
        place = next((pod for pod in free if all(pod.get(key, 0) >= value for key, value in wanted.items())), None)
        assert place is not None, name
        for key, value in wanted.items():
            if value:
                place[key] -= value
    assert config.server.grpc_port == 9000
    assert data["http_options"]["port"] == 8000


def test_kuberays_own_rules(manifests, ray_service) -> None:
    assert len(ray_service["metadata"]["name"]) <= 47
    cluster = ray_service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    ports = [port["name"] for port in head["template"]["spec"]["containers"][0]["ports"]]
    assert any(port == "serve" or port.startswith("serve-") for port in ports)
    assert head["rayStartParams"]["num-cpus"] == "0"
    import ray

    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len(groups) == len(set(groups))
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 40 for name in groups)
    for name, template in pod_templates([ray_service]):
        assert template["spec"].get("restartPolicy", "Never") == "Never", name
        assert not [label for label in template["metadata"]["labels"] if OWNED_BY_KUBERAY.fullmatch(label)], name
        container = template["spec"]["containers"][0]
        assert "readinessProbe" not in container
        assert "livenessProbe" not in container
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        [shm] = [v for v in template["spec"]["volumes"] if v["name"] == mounts["/dev/shm"]]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert shm["emptyDir"]["sizeLimit"]
    budget = find(manifests, "PodDisruptionBudget")["spec"]
    assert type(budget["minAvailable"]) is int
    assert "maxUnavailable" not in budget
    assert 0 <= budget["minAvailable"] < 4


def test_what_is_referred_to_exists(manifests) -> None:
    names = {(item["kind"], item["metadata"]["name"]) for item in manifests}
    assert not [item for item in manifests if item["kind"] == "Secret"]
    secrets = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "secretKeyRef" in value:
                secrets.add((value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]))
            if "secretName" in value and "defaultMode" in value:  # a volume
                assert value["defaultMode"] == 0o440
                if not value.get("optional"):
                    secrets.add((value["secretName"], "token"))
            if "configMapRef" in value:
                assert ("ConfigMap", value["configMapRef"]["name"]) in names
            if "claimName" in value:
                assert ("PersistentVolumeClaim", value["claimName"]) in names
            if "serviceAccountName" in value:
                assert ("ServiceAccount", value["serviceAccountName"]) in names
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(manifests)
    cluster = find(manifests, "RayService")["spec"]["rayClusterConfig"]
    secrets.add((cluster["authOptions"]["secretName"], "auth_token"))
    assert secrets == SECRETS
    readme = (K8S / "README.md").read_text()
    assert all(name in readme and key in readme for name, key in SECRETS)
    host, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    assert find(manifests, "Service", host)["spec"]["ports"][0]["port"] == int(port)


def test_services_policies_and_budgets_select_pods_that_exist(manifests) -> None:
    pods = [(spec, labels) for _, spec, labels in pods_with_labels(manifests)]
    pods.append(({"containers": [{"name": "cleanup", "ports": []}]}, {"ray.io/node-type": "redis-cleanup"}))

    def matching(selector: dict[str, Any]) -> list[dict[str, Any]]:
        return [spec for spec, labels in pods if selects(selector, labels)]

    for item in manifests:
        if item["kind"] == "Service":
            chosen = matching({"matchLabels": item["spec"]["selector"]})
            assert len(chosen) == 1, item["metadata"]["name"]
            open_ports = {port["name"] for port in chosen[0]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= open_ports
        elif item["kind"] == "PodDisruptionBudget":
            assert len(matching(item["spec"]["selector"])) == 1
        elif item["kind"] == "NetworkPolicy":
            assert matching(item["spec"]["podSelector"]), item["metadata"]["name"]
            for rule in [*item["spec"].get("ingress", ()), *item["spec"].get("egress", ())]:
                for peer in [*rule.get("from", ()), *rule.get("to", ())]:
                    if "podSelector" in peer and "namespaceSelector" not in peer:
                        assert matching(peer["podSelector"]), item["metadata"]["name"]


def test_the_dashboard_shows_metrics_that_exist(manifests) -> None:
    dashboard = json.loads(find(manifests, "ConfigMap", "stageline-dashboard")["data"]["stageline.json"])
    names = set(re.findall(r"stageline:\w+", json.dumps(dashboard)))
    metrics = Metrics("m", lambda: ())
    for name in re.findall(r'metrics\.gauge\("(\w+)"', (K8S.parent / "gateway/engine/engine.py").read_text()):
        metrics.gauge(name, "", lambda: 0.0)
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    real = {family.name + end for family in metrics.registry.collect() for end in suffixes[family.type]}
    assert names <= real
    assert len(names) >= 15
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_optional_objects_find_what_they_name(manifests) -> None:
    issuers = {item["metadata"]["name"] for item in manifests if item["kind"] == "Issuer"}
    certificates = [item["spec"] for item in manifests if item["kind"] == "Certificate"]
    assert {one["issuerRef"]["name"] for one in certificates} == issuers
    made = {one["secretName"] for one in certificates}
    assert {i["spec"]["ca"]["secretName"] for i in manifests if i["kind"] == "Issuer" and "ca" in i["spec"]} <= made
    mounted = {volume["secret"]["secretName"] for _, template in pod_templates([find(manifests, "RayService")])
               for volume in template["spec"]["volumes"] if "secret" in volume}  # fmt: skip
    assert mounted <= made
    queue = find(manifests, "ClusterQueue")
    assert find(manifests, "LocalQueue")["spec"]["clusterQueue"] == queue["metadata"]["name"]
    flavor = find(manifests, "ResourceFlavor")["metadata"]["name"]
    assert queue["spec"]["resourceGroups"][0]["flavors"][0]["name"] == flavor
    ports = {port["name"] for _, template in pod_templates([find(manifests, "RayService")])
             for port in template["spec"]["containers"][0]["ports"]}  # fmt: skip
    for monitor in (item for item in manifests if item["kind"] == "PodMonitor"):
        assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_everything_is_denied_that_no_policy_allows(manifests) -> None:
    policies = [item["spec"] for item in manifests if item["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    for spec in policies:
        for rule in spec.get("ingress", ()):
            assert rule.get("from"), "an ingress rule without peers is open to everybody"


def test_the_downloader_and_the_waiting_pods_agree(manifests) -> None:
    model = find(manifests, "ConfigMap", "stageline-model")["data"]
    config = serve_config(find(manifests, "RayService"))["applications"][0]["args"]["model"]
    assert model["FOLDER"] == config["path"]
    for name, template in pod_templates([find(manifests, "RayService")]):
        [wait] = template["spec"]["initContainers"]
        assert f"-f {model['FOLDER']}/.stageline-complete" in wait["command"][2], name
    container = find(manifests, "Job")["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["--model", "$(MODEL)", "--revision", "$(REVISION)", "--into", "$(FOLDER)"]
    assert model.keys() == {"MODEL", "REVISION", "FOLDER"}
    storage = find(manifests, "PersistentVolumeClaim", "stageline-weights")["spec"]["resources"]["requests"]["storage"]
    assert int(storage.removesuffix("Gi")) * 2**30 > 1.1 * 2 * 72_706_203_648


def test_yaml_of_the_readme_is_yaml() -> None:
    for block in re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL):
        assert yaml.safe_load(block) is not None
