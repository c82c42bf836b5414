"""Reading manifests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

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
