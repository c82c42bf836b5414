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
            cluster = item["spec"]["rayClusterConfig"]
            yield f"{name} head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name} {group['groupName']}", group["template"]
        elif "template" in item["spec"] if "spec" in item else False:
            yield name, item["spec"]["template"]


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
