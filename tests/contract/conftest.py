"""The committed manifests, parsed once. No cluster here."""

from __future__ import annotations

from typing import Any

import pytest
from manifest_files import K8S, read_folder


@pytest.fixture(scope="session")
def manifests() -> list[dict[str, Any]]:
    """All objects below k8s/, copies of nothing: do not change them."""
    return read_folder(K8S)


@pytest.fixture(scope="session")
def ray_service(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    [service] = [item for item in manifests if item["kind"] == "RayService"]
    return service
