"""A batch job as a RayJob: the planner's own manifest, for one dataset. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from gateway.batch.dataset.names import check_files
from gateway.planner.k8s import BATCH_JOB, BATCH_MOUNT, SERVE_ADDRESS, Deployment, check_names, common_values, render
from stageline.errors import ConfigError

MAX_NAME_CHARS = 47  # KubeRay adds to it
ANNOTATIONS = {"input": "stageline.dev/input", "output": "stageline.dev/output", "errors": "stageline.dev/errors"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
SELECTOR = "app.kubernetes.io/part-of=stageline,app.kubernetes.io/component=batch"
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
# The entrypoint passes through two shells, each of which quotes in its own way.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One dataset. Places are URLs, or paths below /data, where the pods mount `volume_claim`. `name`: by default one that
    follows from the three places, so that the same command finds the same job."""

    input: str
    output: str
    errors: str
    name: str = ""
    address: str = SERVE_ADDRESS
    volume_claim: str = "stageline-batch"
    queue: str = ""
    concurrency: int = 64
    workers: int = 1
    deployment: Deployment = field(default_factory=Deployment)

    @property
    def job_name(self) -> str:
        """Of the RayJob."""
        places = "\0".join((self.input, self.output, self.errors))
        return self.name or f"batch-{hashlib.sha256(places.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def batch_job(job: BatchJob) -> dict[str, Any]:
    """The RayJob. Raises ConfigError for names and places that it cannot have."""
    _check(job)
    documents = yaml.safe_load_all(render(BATCH_JOB, common_values(job.deployment)))
    [manifest] = [document for document in documents if document["kind"] == "RayJob"]
    places = {"input": job.input, "output": job.output, "errors": job.errors}
    manifest["metadata"]["name"] = job.job_name
    manifest["metadata"]["annotations"] = {key: places[name] for name, key in ANNOTATIONS.items()}
    if job.queue:
        manifest["metadata"]["labels"][QUEUE_LABEL] = job.queue
    spec = manifest["spec"]
    spec["entrypoint"] = (
        f"python -m gateway.batch.dataset {job.input} --output-file {job.output} --error-file {job.errors} "
        f"--address {job.address} --concurrency {job.concurrency} --workers {job.workers}"
    )
    cluster = spec["rayClusterSpec"]
    [runners] = cluster["workerGroupSpecs"]
    # A pod has room for a runner and, beside it, for reading.
    runners["replicas"] = runners["minReplicas"] = runners["maxReplicas"] = job.workers
    on_volume = any(_is_path(place) for place in places.values())
    for template in (cluster["headGroupSpec"]["template"], runners["template"]):
        pod = template["spec"]
        [data] = [volume for volume in pod["volumes"] if volume["name"] == "data"]
        if on_volume:
            data["persistentVolumeClaim"]["claimName"] = job.volume_claim
        else:
            pod["volumes"].remove(data)
            for container in pod["containers"]:
                container["volumeMounts"] = [one for one in container["volumeMounts"] if one["name"] != "data"]
    return manifest  # type: ignore[no-any-return]


def _check(job: BatchJob) -> None:
    check_names(job.deployment)
    check_files(job.input, job.output, job.errors)
    check_name(job.job_name)
    for flag, place in (("INPUT", job.input), ("--output-file", job.output), ("--error-file", job.errors)):
        if _is_path(place) and (not place.startswith(f"{BATCH_MOUNT}/") or ".." in place.split("/")):
            raise ConfigError(
                "PLACE_NOT_IN_CLUSTER",
                f"{flag} {place}: the job's pods read no file of this machine; give an s3:// or gs:// URL, or a path below "
                f"{BATCH_MOUNT}, where they mount the volume claim {job.volume_claim}",
                field=flag,
            )
    for flag, text in (
        ("INPUT", job.input), ("--output-file", job.output), ("--error-file", job.errors), ("--address", job.address),
    ):  # fmt: skip
        if not _PLAIN.fullmatch(text) or text.startswith("-"):
            raise ConfigError(
                "PLACE_INVALID", f"{flag} {text!r}: expected letters, digits and _ . / : @ % + = , - only: the RayJob's "
                "entrypoint is read by shells", field=flag,
            )  # fmt: skip
    if not job.address.startswith(("http://", "https://")):
        raise ConfigError(
            "ADDRESS_INVALID", f"--address {job.address}: with --kubernetes it is the HTTP door as pods reach it, such as "
            f"{SERVE_ADDRESS}", field="--address",
        )  # fmt: skip
    for flag, text, pattern, expected in (
        ("--queue", job.queue or "q", _LABEL, "the name of a LocalQueue"),
        ("--volume-claim", job.volume_claim, _CLAIM, "the name of a PersistentVolumeClaim"),
    ):
        if not pattern.fullmatch(text):
            raise ConfigError("NAME_INVALID", f"{flag} {text!r}: expected {expected}", field=flag)
    for flag, value, most in (("--concurrency", job.concurrency, 65536), ("--workers", job.workers, 1024)):
        if not 1 <= value <= most:
            raise ConfigError("CONFIG_INVALID", f"{flag} must be from 1 to {most}, got {value}", field=flag)


def check_name(name: str) -> None:
    """Raises ConfigError for a name that KubeRay does not take for a RayJob."""
    if len(name) > MAX_NAME_CHARS:
        raise ConfigError(
            "NAME_TOO_LONG", f"the name {name!r} has {len(name)} characters; KubeRay takes {MAX_NAME_CHARS} at most",
            field="--name",
        )  # fmt: skip
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "NAME_INVALID",
            f"the name {name!r} is not one of Kubernetes: lower-case letters, digits and dashes, a letter first",
            field="--name",
        )


def _is_path(place: str) -> bool:
    return "://" not in place
