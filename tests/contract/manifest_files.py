"""Reading manifests, and having them written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gateway.cli import main

DEFAULT = ("plan", "--model", "qwen2-72b", "--gpu", "a100-80g:4", "--output", "k8s")
K8S = Path(__file__).parents[2] / "k8s"


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, as the API server's strict mode does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key stands twice in {keys}"
        return super().construct_mapping(node, deep)


def read_manifests(text: str) -> list[dict[str, Any]]:
    """Every object of a YAML stream."""
    return [document for document in yaml.load_all(text, Loader=StrictLoader) if document]


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Every object of every manifest below it."""
    return [item for path in sorted(folder.rglob("*.yaml")) for item in read_manifests(path.read_text())]


def pod_templates(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod template) of everything that makes pods."""
    for item in manifests:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "RayService":
            yield from _ray_pods(name, item["spec"]["rayClusterConfig"])
        elif item["kind"] == "RayJob":
            yield f"{name} submitter", item["spec"]["submitterPodTemplate"]
            yield from _ray_pods(name, item["spec"]["rayClusterSpec"])
        elif "template" in item["spec"] if "spec" in item else False:
            yield name, item["spec"]["template"]


def _ray_pods(name: str, cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield f"{name} head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield f"{name} {group['groupName']}", group["template"]


def pods_with_labels(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """(name, pod's spec, its labels), with those that KubeRay adds."""
    for name, template in pod_templates(manifests):
        labels = dict(template["metadata"]["labels"])
        owner, _, group = name.partition(" ")
        if owner.startswith("Ray") and group != "submitter":
            labels |= {"ray.io/is-ray-node": "yes", "ray.io/group": "headgroup" if group == "head" else group,
                       "ray.io/node-type": "head" if group == "head" else "worker"}  # fmt: skip
        yield name, template["spec"], labels


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a LabelSelector matches; of its operators, those that are used here."""
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "NotIn"
        if labels.get(one["key"]) in one["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def planned(tmp_path: Path, *args: str) -> list[dict[str, Any]]:
    """The objects that `stageline plan … --output k8s` writes."""
    assert main([*DEFAULT, *args, "--output-dir", str(tmp_path)]) == 0
    return read_folder(tmp_path)


def find(manifests: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    [item] = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return item


def serve_config(service: dict[str, Any]) -> dict[str, Any]:
    [data] = read_manifests(service["spec"]["serveConfigV2"])
    return data
