"""A plan as Kubernetes manifests: text templates (gateway/planner/manifests/) filled with the plan's numbers."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jinja2
import yaml

from gateway.config import Config
from gateway.planner.catalogue import Gpu, hub_id, known_models
from gateway.planner.types import ClusterPlan
from stageline.errors import ConfigError
from stages.download import MARK

MODELS_MOUNT = "/models"
STAGES_MOUNT, DOOR_MOUNT = "/etc/stageline/stages", "/etc/stageline/door"  # Secrets
# Fields that the plan or the cluster decides. The second group would be overruled without a word: it is refused.
_DECIDED = {"model.path", "model.name", "model.dtype", "model.revision", "stages.count", "stages.layers",
            "kv_cache.block_size_tokens"}  # fmt: skip
_NOT_HERE = {"stages.replicas", "stages.device", "stages.num_cpus", "stages.num_gpus", "stages.host",
             "kv_cache.num_blocks", "kv_cache.memory_bytes", "server.host", "server.grpc_port", "server.http_port",
             "server.ready_timeout_s"}  # fmt: skip
BATCH_JOB, BATCH_MOUNT = "jobs/batch-rayjob.yaml", "/data"
SERVE_ADDRESS = "http://stageline-serve-svc:8000"  # KubeRay's own Service of the HTTP door, from pods of the namespace
POLICY = "gateway.autoscale.policy:LockstepPolicy"  # as gateway.app.autoscaling_policy declares it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
# KubeRay: a group's name, gpu-NAME, has 40 characters at most.
_GPU_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,34}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the manifests need besides the plan. `image` has no tag: `-cpu` and `-cuda` builds of `version` are used.

    `config` gives the application every field that the plan does not decide.
    """

    image: str = "stageline"
    version: str = "0.1.0"
    namespace: str = "stageline"
    storage_class: str = "rwx"
    operator_namespace: str = "kuberay-system"
    config: Config = field(default_factory=Config)


def manifests(plan: ClusterPlan, gpus: Mapping[str, Gpu], deployment: Deployment) -> dict[str, str]:
    """Path below `k8s/` → text of every manifest of a plan that fits.

    Raises ConfigError where the plan does not fit, or a name is not one that Kubernetes takes.
    """
    if not plan.fits:
        raise ConfigError(
            "PLAN_DOES_NOT_FIT", "the plan does not fit its GPUs: there is nothing to deploy; see --output table"
        )
    _check(plan, deployment)
    _check_gpus({gpus[stage.gpu] for stage in plan.stages})
    values = _values(plan, gpus, deployment)
    return {name: render(name, values) for name in template_names()}


def render(name: str, values: Mapping[str, object]) -> str:
    """The template `name`, filled."""
    return _environment().get_template(name).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # YAML, not HTML
    )


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
    for section, fields in deployment.config.model_dump(exclude_unset=True).items():
        for key in fields:
            if f"{section}.{key}" in _NOT_HERE:
                raise ConfigError(
                    "FIELD_DECIDED_BY_PLAN",
                    f"{section}.{key} is decided by the plan, or fixed by the manifests; leave it out of --output k8s",
                    field=f"{section}.{key}",
                )
    if plan.dtype != "bfloat16" or plan.block_size_tokens % 256:
        raise ConfigError(
            "NOT_FOR_CUDA",
            f"model.dtype {plan.dtype} with blocks of {plan.block_size_tokens} tokens: FlashAttention-2 on CUDA needs "
            "bfloat16 and kv_cache.block_size_tokens in multiples of 256",
            field="model.dtype",
        )
    check_names(deployment)


def check_names(deployment: Deployment) -> None:
    """Raise ConfigError for a name that Kubernetes does not take."""
    label = "at most 63 lower-case letters, digits and dashes"
    subdomain = "lower-case letters, digits, dashes and dots"
    image = "an image name without tag, such as registry.example/team/stageline"
    for flag, value, pattern, expected in (
        ("--namespace", deployment.namespace, _DNS_LABEL, label),
        ("--operator-namespace", deployment.operator_namespace, _DNS_LABEL, label),
        ("--storage-class", deployment.storage_class, _DNS_SUBDOMAIN, subdomain),
        ("--image", deployment.image, _IMAGE, image),
    ):
        if not pattern.fullmatch(value):
            raise ConfigError("NAME_INVALID", f"{flag} {value!r}: expected {expected}", field=flag, value=value)


def _check_gpus(gpus: Iterable[Gpu]) -> None:
    """Names of a user's own profile become names of groups and values of labels."""
    for gpu in gpus:
        if not _GPU_NAME.fullmatch(gpu.name):
            raise ConfigError(
                "NAME_INVALID", f"GPU {gpu.name!r}: expected at most 36 lower-case letters, digits and dashes",
                field="profile", value=gpu.name,
            )  # fmt: skip
        for product in gpu.products:
            if not _LABEL_VALUE.fullmatch(product):
                raise ConfigError(
                    "NAME_INVALID", f"GPU {gpu.name}: product {product!r} cannot be the value of a node's label",
                    field="profile", value=product,
                )  # fmt: skip


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
    """All manifests as one YAML stream for `kubectl apply -f -`, each with the name of its file. Without `optional/`, whose
    kinds a cluster may not have, and the batch job, which waits for an input."""
    wanted = {name: text for name, text in files.items() if not name.startswith("optional/") and name != BATCH_JOB}
    return "".join(f"---\n# Source: k8s/{name}\n{text}" for name, text in wanted.items())


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


def _values(plan: ClusterPlan, gpus: Mapping[str, Gpu], deployment: Deployment) -> dict[str, object]:
    hub = hub_id(plan.model) if plan.model in known_models() else plan.model
    name = hub.rpartition("/")[2]
    weights = sum(stage.weight_bytes for stage in plan.stages)
    fewest, most = pipelines_of(plan, deployment.config)
    counts: dict[str, int] = {}
    for stage in plan.stages:
        counts[stage.gpu] = counts.get(stage.gpu, 0) + 1
    groups = [
        {
            "name": f"gpu-{gpu}",
            "gpu": gpu,
            "replicas": count * max(1, fewest) + spares,
            "min_replicas": count * fewest + spares,
            "max_replicas": count * most + spares,
            "spares": spares,
            "products": _products(gpus[gpu]),
        }
        for gpu, count in counts.items()
        for spares in [plan.num_spares if gpu == plan.spare_gpu else 0]
    ]
    inventory = " and ".join(f"{count} x {gpu}" for gpu, count in plan.gpu_counts().items())
    args = _arguments(plan, deployment.config, f"{MODELS_MOUNT}/{name}", name)
    return {
        **common_values(deployment),
        "title": f"{name} on {inventory}: {plan.num_pipelines} pipeline{'s' * (plan.num_pipelines > 1)} of "
        f"{len(plan.stages)} stages"
        + (f", {plan.num_spares} spare{'s' * (plan.num_spares > 1)}" if plan.num_spares else ""),
        "storage_gi": math.ceil(1.25 * weights / 2**30 / 10) * 10,
        "weights_gb": round(weights / 1e9),
        "hub_id": hub,
        "models_mount": MODELS_MOUNT,
        "stages_mount": STAGES_MOUNT,
        "door_mount": DOOR_MOUNT,
        "door_tls": deployment.config.security.certificate_file is not None,
        "model_folder": f"{MODELS_MOUNT}/{name}",
        "revision": deployment.config.model.revision or "main",
        "args": yaml.safe_dump(args, sort_keys=False, default_flow_style=False, width=1000).rstrip(),
        "dashboard": _source("optional/grafana-dashboard.json").rstrip(),
        "policy": POLICY,
        "target_sequences": deployment.config.pipelines.target_sequences,
        "fewest": fewest,
        "most": most,
        "gateway_grace_s": math.ceil(args["server"]["drain_timeout_s"]) + 60,
        "kv_tokens": f"{plan.kv_capacity_tokens:,}",
        "stages": plan.stages,
        "spare_gpu": plan.spare_gpu,
        "gpu_groups": groups,
        "min_available": max(0, len(plan.stages) * fewest + plan.num_spares - 1),
        "mark": MARK,
        "gib": lambda size: f"{size / 2**30:.2f}",
    }


def common_values(deployment: Deployment) -> dict[str, object]:
    """What templates take from no plan; all that the batch job's takes."""
    image = f"{deployment.image}:{deployment.version}"
    return {
        "namespace": deployment.namespace,
        "operator_namespace": deployment.operator_namespace,
        "storage_class": deployment.storage_class,
        "cpu_image": f"{image}-cpu",
        "cuda_image": f"{image}-cuda",
        "ray_version": metadata.version("ray"),
        "batch_mount": BATCH_MOUNT,
        "batch_entrypoint": f"python -m gateway.batch.dataset {BATCH_MOUNT}/in.jsonl --output-file {BATCH_MOUNT}/out.jsonl "
        f"--address {SERVE_ADDRESS}",
    }


def pipelines_of(plan: ClusterPlan, config: Config) -> tuple[int, int]:
    """Fewest and most pipelines: what the GPUs of the plan make, unless `pipelines.max` lets demand decide.

    Raises ConfigError for a `pipelines.min` without `pipelines.max`, and a maximum below what the GPUs make.
    """
    asked = config.pipelines
    if asked.max is None:
        if "min" in asked.model_dump(exclude_defaults=True):
            raise ConfigError("PIPELINES_MAX_MISSING", "pipelines.min needs pipelines.max", field="pipelines.max")
        return plan.num_pipelines, plan.num_pipelines
    if asked.max < plan.num_pipelines:
        raise ConfigError(
            "GPUS_UNUSED",
            f"the GPUs make {plan.num_pipelines} pipelines and pipelines.max is {asked.max}: raise it, or name fewer GPUs",
            field="pipelines.max",
            value=asked.max,
        )
    return asked.min, asked.max


def _arguments(plan: ClusterPlan, config: Config, folder: str, name: str) -> dict[str, dict[str, Any]]:
    """The application's arguments: what the plan decides, then every other field that is not at its default."""
    planned: dict[str, dict[str, Any]] = {
        "model": {"path": folder, "name": config.model.name or name, "dtype": plan.dtype},
        "stages": {"layers": plan.layers(), "device": "cuda", "num_gpus": 1},
        "kv_cache": {"block_size_tokens": plan.block_size_tokens, "num_blocks": plan.num_blocks},
        "scheduler": {
            "max_step_tokens": config.scheduler.max_step_tokens,
            "max_step_sequences": config.scheduler.max_step_sequences,
        },
        "pipelines": dict(zip(("min", "max"), pipelines_of(plan, config), strict=True)),
        "server": {"host": "0.0.0.0", "grpc_port": 9000, "drain_timeout_s": 60.0},
        "security": {"stage_token_file": f"{STAGES_MOUNT}/token"},
    }
    for section, fields in config.model_dump(exclude_defaults=True).items():
        for key, value in fields.items():
            if f"{section}.{key}" not in _DECIDED:
                planned.setdefault(section, {})[key] = value
    return planned


def _products(gpu: Gpu) -> tuple[str, ...]:
    if not gpu.products:
        raise ConfigError(
            "GPU_WITHOUT_PRODUCT",
            f"GPU {gpu.name}: pods find their nodes by the label nvidia.com/gpu.product; "
            "give its values as `products` in the profile",
            field="profile",
        )
    return gpu.products
