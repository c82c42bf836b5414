"""Batch jobs on a Kubernetes cluster: RayJobs, created, followed and deleted through the API server."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from gateway.batch.dataset.names import error_file
from gateway.cluster_api import api_client
from gateway.planner.batch_job import ANNOTATIONS, SELECTOR, BatchJob, batch_job, check_name
from gateway.planner.k8s import SERVE_ADDRESS, Deployment, check_names
from stageline.errors import ConfigError, NotFoundError, StagelineError, UnavailableError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
POLL_S = 2.0
GIVE_UP_S = 600.0  # without any answer of the API server, while a job is followed
CALL_TIMEOUT_S = 30

Note = Callable[[str], None]
JobState = Literal["in_progress", "completed", "failed", "cancelling"]


def add_cluster_arguments(parser: argparse.ArgumentParser, *, submit: bool = False) -> None:
    """Flags of the verbs that can speak of a cluster."""
    group = parser.add_argument_group("--kubernetes")
    group.add_argument("--kubernetes", action="store_true", help="a RayJob on the current kubeconfig's cluster")
    group.add_argument("--namespace", help=f"default: {Deployment().namespace}")
    if submit:
        group.add_argument("--name", help="of the RayJob; default: one that follows from the files")
        group.add_argument("--image", help="without its tag, as in `stageline plan`")
        group.add_argument("--volume-claim", help="mounted at /data, for paths; default: stageline-batch")
        group.add_argument("--queue", help="Kueue's LocalQueue to wait in")
        group.add_argument("--workers", type=int, help="pods that send requests; default: 1")
        group.add_argument("--concurrency", type=int, help="requests at the server at once; default: 64")


_ONLY_HERE = ("namespace", "name", "image", "volume_claim", "queue", "workers", "concurrency")
_NOT_HERE = ("tls", "ca_file", "certificate_file", "key_file", "server_name", "api_key_file", "window_s")


def check_flags(args: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that says nothing in this mode: none is dropped in silence."""
    on_cluster = getattr(args, "kubernetes", False)
    for name in _NOT_HERE if on_cluster else _ONLY_HERE:
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            why = (
                f"{flag} does not go with --kubernetes; the job's API key is STAGELINE_API_KEY in the Secret stageline-batch"
                if on_cluster
                else f"{flag} belongs to --kubernetes"
            )
            raise ConfigError("CONFIG_INVALID", why, field=flag)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """One RayJob at one moment."""

    name: str
    namespace: str
    state: JobState
    job_status: str
    deployment_status: str
    message: str
    created_s: int
    places: dict[str, str]

    @property
    def ended(self) -> bool:
        """Nothing of it runs any more."""
        return self.state in ("completed", "failed")

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's batch object, as far as a RayJob knows."""
        return {
            "id": self.name,
            "object": "batch",
            "status": self.state,
            "created_at": self.created_s,
            "namespace": self.namespace,
            "job_status": self.job_status,
            "deployment_status": self.deployment_status,
            "message": self.message,
            **self.places,
        }

    def describe(self) -> str:
        """One line for people."""
        parts = [self.name, self.state]
        if not self.ended:
            parts.append("/".join(filter(None, (self.deployment_status, self.job_status))) or "waiting for KubeRay")
        elif self.state == "failed":
            parts.append(self.message or self.job_status or self.deployment_status)
        return "  ".join((*parts, self.places.get("output", "")))


def from_rayjob(item: dict[str, Any]) -> ClusterJob:
    """What the API server says of a RayJob."""
    metadata, status = item["metadata"], item.get("status") or {}
    deployment, job = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    state: JobState = "in_progress"
    if metadata.get("deletionTimestamp"):
        state = "cancelling"
    elif deployment in ("Complete", "Failed", "ValidationFailed"):
        state = "completed" if deployment == "Complete" and job in ("SUCCEEDED", "") else "failed"
    annotations = metadata.get("annotations") or {}
    created = metadata.get("creationTimestamp")
    return ClusterJob(
        name=metadata["name"],
        namespace=metadata["namespace"],
        state=state,
        job_status=job,
        deployment_status=deployment,
        message=" ".join(filter(None, (status.get("reason"), status.get("message")))),
        created_s=int(datetime.fromisoformat(created).timestamp()) if created else 0,
        places={name: annotations[key] for name, key in ANNOTATIONS.items() if key in annotations},
    )


class RayJobs:
    """The RayJobs of a namespace. What the API server refuses is a ConfigError that says what to do."""

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import client

        self._objects, self._namespace = client.CustomObjectsApi(api), namespace

    def get(self, name: str) -> ClusterJob | None:
        """None where there is none."""
        try:
            return from_rayjob(self._call("get", self._objects.get_namespaced_custom_object, name))
        except NotFoundError:
            return None

    def list(self, limit: int) -> list[ClusterJob]:
        """Batch jobs, the newest first."""
        found: list[ClusterJob] = []
        token = None
        while True:
            page = self._call(
                "list", self._objects.list_namespaced_custom_object, label_selector=SELECTOR, limit=500,
                **({"_continue": token} if token else {}),
            )  # fmt: skip
            found += map(from_rayjob, page["items"])
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return sorted(found, key=lambda job: (-job.created_s, job.name))[:limit]

    def create(self, manifest: dict[str, Any]) -> ClusterJob:
        """The new job, or the one that has its name already."""
        from kubernetes.client.exceptions import ApiException

        try:
            return from_rayjob(self._call("create", self._objects.create_namespaced_custom_object, manifest))
        except ApiException as error:
            found = self.get(manifest["metadata"]["name"]) if error.status == 409 else None
            if found is None:
                raise
            return found

    def delete(self, name: str) -> None:
        """With its cluster; nothing where it is gone. Foreground: it stays, as cancelling, until its cluster is gone."""
        with contextlib.suppress(NotFoundError):
            self._call("delete", self._objects.delete_namespaced_custom_object, name, propagation_policy="Foreground")

    def _call(self, verb: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        from kubernetes.client.exceptions import ApiException

        try:
            return method(
                GROUP, VERSION, self._namespace, PLURAL, *arguments, _request_timeout=CALL_TIMEOUT_S, **options
            )
        except ApiException as error:
            typed = self._typed(verb, error.status, str(error.reason), error.body)
            if typed is None:
                raise
            raise typed from None

    def _typed(self, verb: str, status: int, reason: str, body: Any) -> StagelineError | None:
        try:
            answer = json.loads(body or "")
        except ValueError:
            answer = {}
        details = (answer.get("details") or {}) if isinstance(answer, dict) else {}
        message = answer.get("message", reason) if isinstance(answer, dict) else reason
        namespace = self._namespace
        if status in (401, 403):
            return ConfigError(
                "RAYJOBS_FORBIDDEN",
                f"--kubernetes: the API server refuses to {verb} rayjobs in namespace {namespace} ({status} {reason}); "
                "have yourself bound to the Role stageline-batch-submitter of k8s/10-rbac.yaml",
                status=status,
            )
        if status == 404 and details.get("kind") == "namespaces":
            return ConfigError(
                "NAMESPACE_NOT_FOUND",
                f"--kubernetes: there is no namespace {namespace}; name the one of the server with --namespace, or apply "
                "k8s/00-namespace.yaml",
                field="--namespace",
            )
        if status == 404 and details.get("name"):
            return NotFoundError("BATCH_NOT_FOUND", f"there is no such batch job in namespace {namespace}")
        if status == 404:
            return ConfigError(
                "RAYJOB_CRD_MISSING",
                "--kubernetes: the cluster knows no RayJob; install the KubeRay operator v1.7.0 (k8s/README.md)",
            )
        if status in (400, 422):
            return ConfigError("RAYJOB_REFUSED", f"--kubernetes: the API server refuses the RayJob: {message}")
        return None


def run_on_cluster(args: argparse.Namespace, note: Note | None) -> tuple[int, list[ClusterJob]]:
    """One of submit, get, list, cancel; returns the exit code and the jobs to show."""
    deployment = Deployment(**{k: v for k in ("namespace", "image") if (v := getattr(args, k, None))})
    check_names(deployment)
    if args.batch_verb == "submit":
        job = _job(args, deployment)
        manifest = batch_job(job)  # before anybody is asked
        with api_client("--kubernetes") as api:
            shown = _submit(
                RayJobs(api, deployment.namespace), manifest, wait=args.wait, note=note or (lambda text: None)
            )
        return int(shown.state in ("failed", "cancelling")), [shown]
    if args.batch_verb != "list":
        check_name(args.id)
    with api_client("--kubernetes") as api:
        jobs = RayJobs(api, deployment.namespace)
        if args.batch_verb == "list":
            return 0, jobs.list(args.limit)
        found = jobs.get(args.id)
        if found is not None and args.batch_verb == "cancel":
            jobs.delete(args.id)
            found = jobs.get(args.id) or replace(found, state="cancelling")
    if found is None:
        raise NotFoundError("BATCH_NOT_FOUND", f"there is no batch job {args.id} in namespace {deployment.namespace}")
    return 0, [found]


def _job(args: argparse.Namespace, deployment: Deployment) -> BatchJob:
    given = {
        key: value
        for key in ("name", "volume_claim", "queue", "workers", "concurrency")
        if (value := getattr(args, key)) is not None
    }
    return BatchJob(
        input=args.input,
        output=args.output_file,
        errors=args.error_file or error_file(args.output_file),
        address=args.address or SERVE_ADDRESS,
        deployment=deployment,
        **given,
    )


def _submit(jobs: RayJobs, manifest: dict[str, Any], *, wait: bool, note: Note) -> ClusterJob:
    """Create the job, or find the one that the same command made; one that failed is made anew and goes on."""
    name = manifest["metadata"]["name"]
    places = {short: manifest["metadata"]["annotations"][key] for short, key in ANNOTATIONS.items()}
    found = jobs.get(name)
    if found is not None and found.places != places:
        raise ConfigError(
            "NAME_TAKEN", f"the RayJob {name} is another one, of {found.places.get('input', 'something else')}; "
            "give another --name", field="--name",
        )  # fmt: skip
    if found is not None and found.state in ("failed", "cancelling"):
        note(f"{name} {found.state}: it is made anew and goes on where it was\n")
        jobs.delete(name)
        _until(jobs, name, lambda now: now is None, note)
        found = None
    if found is None:
        found = jobs.create(manifest)
    if not wait:
        return found
    ended = _until(jobs, name, lambda now: now is None or now.state != "in_progress", note)
    return ended or replace(found, state="cancelling")


def _until(jobs: RayJobs, name: str, condition: Callable[[ClusterJob | None], bool], note: Note) -> ClusterJob | None:
    """Follow a job; an API server that is away for a while is waited for."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    heard_s = time.monotonic()
    while True:
        try:
            now = jobs.get(name)
            heard_s = time.monotonic()
            if condition(now):
                return now
            if now is not None:
                note(now.describe())
        except (ApiException, HTTPError, UnavailableError):
            if time.monotonic() - heard_s > GIVE_UP_S:
                raise
        time.sleep(POLL_S)
