"""A plan as Kubernetes manifests: text templates (gateway/planner/manifests/) filled with the plan's numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

import jinja2

from gateway.planner.catalogue import Gpu, hub_id, known_models
from gateway.planner.cluster_plan import ClusterPlan
from gateway.planner.cost import Workload
from stageline.errors import ConfigError
from stages.download import MARK

MODELS_MOUNT = "/models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the manifests need besides the plan. `image` has no tag: `-cpu` and `-cuda` builds of `version` are used."""

    image: str = "stageline"
    version: str = "0.1.0"
    namespace: str = "stageline"
    storage_class: str = "rwx"
    operator_namespace: str = "kuberay-system"
    spare_gpus: int = 0


def manifests(plan: ClusterPlan, workload: Workload, gpus: Mapping[str, Gpu], deployment: Deployment) -> dict[str, str]:
    """Path below `k8s/` → text of every manifest of a plan that fits.

    Raises ConfigError where the plan does not fit, or a name is not one that Kubernetes takes.
    """
    if not plan.fits:
        raise ConfigError(
            "PLAN_DOES_NOT_FIT", "the plan does not fit its GPUs: there is nothing to deploy; see --output table"
        )
    _check(plan, deployment)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # YAML, not HTML
    )
    values = _values(plan, workload, gpus, deployment)
    return {name: environment.get_template(name).render(values) for name in template_names()}


def _check(plan: ClusterPlan, deployment: Deployment) -> None:
    """Raise ConfigError for what would not be valid YAML, or a valid object."""
    if plan.model not in known_models() and not _HUB_ID.fullmatch(plan.model):
        raise ConfigError(
            "MODEL_NOT_ON_HUB",
            f"--output k8s: the weights volume is filled from the hub; {plan.model!r} is neither a hub id (org/name) nor "
            f"one of {', '.join(known_models())}",
            field="model.path",
            value=plan.model,
        )
    for flag, value, pattern, expected in (
        ("--namespace", deployment.namespace, _DNS_LABEL, "at most 63 lower-case letters, digits and dashes"),
        (
            "--operator-namespace",
            deployment.operator_namespace,
            _DNS_LABEL,
            "at most 63 lower-case letters, digits and dashes",
        ),
        ("--storage-class", deployment.storage_class, _DNS_SUBDOMAIN, "lower-case letters, digits, dashes and dots"),
        ("--image", deployment.image, _IMAGE, "an image name without tag, such as registry.example/team/stageline"),
    ):
        if not pattern.fullmatch(value):
            raise ConfigError("NAME_INVALID", f"{flag} {value!r}: expected {expected}", field=flag, value=value)


def write(files: Mapping[str, str], folder: Path) -> None:
    """Write every manifest below `folder`, which is made where it does not exist. Raises ConfigError where it cannot."""
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "OUTPUT_NOT_WRITABLE", f"--output-dir {folder}: {error.strerror}: {error.filename}", field="output_dir"
        ) from None


def as_stream(files: Mapping[str, str]) -> str:
    """All manifests as one YAML stream for `kubectl apply -f -`, each with the name of its file."""
    return "".join(f"---\n# Source: k8s/{name}\n{text}" for name, text in files.items())


def template_names() -> tuple[str, ...]:
    """Paths of the manifests, in the order `kubectl apply` takes them."""
    root = resources.files("gateway.planner").joinpath("manifests")

    def below(folder: Traversable, prefix: str) -> list[str]:
        names = []
        for entry in folder.iterdir():
            if entry.is_dir():
                names += below(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                names.append(prefix + entry.name)
        return names

    return tuple(sorted(below(root, ""), key=lambda name: ("/" in name, name)))


def _source(name: str) -> str:
    return resources.files("gateway.planner").joinpath("manifests", *name.split("/")).read_text(encoding="utf-8")


def _values(
    plan: ClusterPlan, workload: Workload, gpus: Mapping[str, Gpu], deployment: Deployment
) -> dict[str, object]:
    hub = hub_id(plan.model) if plan.model in known_models() else plan.model
    name = hub.rpartition("/")[2]
    weights = sum(stage.weight_bytes for stage in plan.stages)
    counts: dict[str, int] = {}
    for stage in plan.stages:
        counts[stage.gpu] = counts.get(stage.gpu, 0) + plan.num_pipelines
    groups = [
        {
            "name": f"gpu-{gpu}",
            "gpu": gpu,
            "replicas": count + deployment.spare_gpus,
            "spare": deployment.spare_gpus,
            "products": _products(gpus[gpu]),
        }
        for gpu, count in counts.items()
    ]
    inventory = " and ".join(f"{count} x {gpu}" for gpu, count in counts.items())
    image = f"{deployment.image}:{deployment.version}"
    return {
        "title": f"{name} on {inventory}: {plan.num_pipelines} pipeline{'s' * (plan.num_pipelines > 1)} of "
        f"{len(plan.stages)} stages",
        "namespace": deployment.namespace,
        "operator_namespace": deployment.operator_namespace,
        "storage_class": deployment.storage_class,
        "storage_gi": math.ceil(1.25 * weights / 2**30 / 10) * 10,
        "weights_gb": round(weights / 1e9),
        "hub_id": hub,
        "models_mount": MODELS_MOUNT,
        "model_folder": f"{MODELS_MOUNT}/{name}",
        "model_name": name,
        "dtype": plan.dtype,
        "layers": plan.layers(),
        "num_pipelines": plan.num_pipelines,
        "block_size_tokens": plan.block_size_tokens,
        "num_blocks": plan.num_blocks,
        "kv_tokens": f"{plan.kv_capacity_tokens:,}",
        "max_step_tokens": workload.max_step_tokens,
        "max_step_sequences": workload.max_step_sequences,
        "stages": plan.stages,
        "gpu_groups": groups,
        "min_available": max(0, len(plan.stages) * plan.num_pipelines - 1),
        "cpu_image": f"{image}-cpu",
        "cuda_image": f"{image}-cuda",
        "ray_version": metadata.version("ray"),
        "mark": MARK,
        "gib": lambda size: f"{size / 2**30:.2f}",
    }


def _products(gpu: Gpu) -> tuple[str, ...]:
    if not gpu.products:
        raise ConfigError(
            "GPU_WITHOUT_PRODUCT",
            f"GPU {gpu.name}: pods find their nodes by the label nvidia.com/gpu.product; "
            "give its values as `products` in the profile",
            field="profile",
        )
    return gpu.products
