"""Which GPUs a Kubernetes cluster has, read from its nodes' labels and allocatable resources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.cluster_api import api_client
from gateway.planner.catalogue import MIB, Gpu, gpu_of_product
from stageline.errors import NotFoundError, UnauthenticatedError

PRODUCT_LABEL = "nvidia.com/gpu.product"
MEMORY_LABEL = "nvidia.com/gpu.memory"  # MiB of one GPU
RESOURCE = "nvidia.com/gpu"
PAGE_NODES = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInventory:
    """GPUs that could serve, one entry a GPU, and a sentence for each node that was left out."""

    gpus: tuple[Gpu, ...]
    left_out: tuple[str, ...]


def inventory(nodes: Sequence[Any], known: Mapping[str, Gpu]) -> NodeInventory:
    """Count the GPUs of V1Node objects; the larger kinds come first. Nodes that are cordoned or not ready, and products
    that are not known, are left out and named. Occupied GPUs count: what runs on them is not the nodes' to tell."""
    found: list[Gpu] = []
    left_out = []
    for node in nodes:
        labels, name = node.metadata.labels or {}, node.metadata.name
        count = int((node.status.allocatable or {}).get(RESOURCE, "0"))
        if count < 1:
            continue
        product = labels.get(PRODUCT_LABEL)
        reason = _unusable(node)
        gpu = gpu_of_product(product, known) if product else None
        if product is None:
            reason = reason or f"it has no label {PRODUCT_LABEL} (GPU feature discovery sets it)"
        elif gpu is None:
            reason = reason or f"{PRODUCT_LABEL}={product} is not in the catalogue (describe it with --profile FILE)"
        memory = labels.get(MEMORY_LABEL)
        if (
            gpu is not None
            and memory is not None
            and abs(int(memory) * MIB - gpu.memory_bytes) > gpu.memory_bytes // 20
        ):
            reason = reason or f"{MEMORY_LABEL}={memory} does not agree with {product} ({gpu.memory_bytes // MIB} MiB)"
        if reason is not None or gpu is None:
            left_out.append(f"node {name} ({count} GPUs): {reason}")
        else:
            found += [gpu] * count
    found.sort(key=lambda gpu: (-gpu.memory_bytes, gpu.name))
    return NodeInventory(gpus=tuple(found), left_out=tuple(left_out))


def _unusable(node: Any) -> str | None:
    if node.spec.unschedulable:
        return "it is cordoned"
    ready = [condition.status for condition in node.status.conditions or [] if condition.type == "Ready"]
    return None if ready == ["True"] else "it is not ready"


def read_nodes(context: str | None = None) -> list[Any]:
    """All nodes of the cluster that the kubeconfig (or, inside a pod, the service account) points at.

    Raises ConfigError without a usable kubeconfig, UnauthenticatedError where listing nodes is not allowed,
    UnavailableError where the API server does not answer.
    """
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException

    nodes: list[Any] = []
    token: str | None = None
    with api_client("--cluster", context) as api:
        while True:
            try:
                page = client.CoreV1Api(api).list_node(limit=PAGE_NODES, _continue=token, _request_timeout=30)
            except ApiException as error:
                if error.status not in (401, 403):
                    raise
                raise UnauthenticatedError(
                    "NODES_FORBIDDEN",
                    f"--cluster: the API server refused to list nodes ({error.status} {error.reason}); "
                    "it takes a role with `get` and `list` on nodes",
                    status=error.status,
                ) from None
            nodes += page.items
            token = page.metadata._continue if page.metadata else None
            if not token:
                return nodes


def missing_kinds(storage_class: str, context: str | None = None) -> tuple[str, ...]:
    """A sentence for each thing the manifests refer to and the cluster does not have: KubeRay's RayService, the StorageClass
    of the weights. One that may not be read is said to be unknown. Raises ConfigError without a usable kubeconfig."""
    import urllib3
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException

    sentences = []
    with api_client("--cluster", context) as api:

        def has_ray_service() -> bool:
            found = client.CustomObjectsApi(api).get_api_resources("ray.io", "v1", _request_timeout=30)
            return any(resource.kind == "RayService" for resource in found.resources)

        def has_storage_class() -> bool:
            client.StorageV1Api(api).read_storage_class(storage_class, _request_timeout=30)
            return True

        for what, has, help_ in (
            ("kind RayService", has_ray_service, "install the KubeRay operator and its CRDs before `kubectl apply`"),
            (
                f"StorageClass {storage_class}",
                has_storage_class,
                "the volume of the weights would stay Pending: name one that can ReadWriteMany with --storage-class",
            ),
        ):
            try:
                known = None if has() else "has no"
            except ApiException as error:
                known = "has no" if error.status == 404 else f"did not say ({error.status}) whether it has"
            except urllib3.exceptions.HTTPError as error:
                known = f"did not say ({error}) whether it has"
            if known is not None:
                sentences.append(f"the cluster {known} {what}: {help_}")
    return tuple(sentences)


def cluster_gpus(known: Mapping[str, Gpu], context: str | None = None) -> NodeInventory:
    """`read_nodes` and `inventory`. Raises NotFoundError where no GPU could serve; it names the nodes left out."""
    result = inventory(read_nodes(context), known)
    if not result.gpus:
        why = "; ".join(result.left_out) or f"no node has allocatable {RESOURCE}"
        raise NotFoundError("NO_GPU_NODES", f"--cluster: found no GPU that could serve: {why}")
    return result
