"""RayJobs of a Kubernetes namespace: what the API server says of them, and what its refusals mean."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from gateway.planner.batch_job import ANNOTATIONS, SELECTOR
from stageline.errors import ConfigError, NotFoundError, StagelineError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
CALL_TIMEOUT_S = 30

JobState = Literal["in_progress", "completed", "failed", "cancelling"]


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
