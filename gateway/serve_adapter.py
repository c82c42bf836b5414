"""The only module that touches Ray's alpha surfaces: replica metadata, request routers, internal key-values (Ray 2.60).

Serve imports it in the controller, in stage replicas and in the gateway, so it must stay light: the stage itself is
loaded by name inside the replica that runs it, and the gateway process never loads torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.experimental import internal_kv
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from gateway import replica_feed
from stageline.errors import StagelineError
from stages.logs import log_to_stderr

STAGE_MODULE, STAGE_CLASS, SPEC_CLASS = "stages.replica", "StageReplica", "StageSpec"


_BOARD = "stageline-start"  # namespace of what stages report while they start: key application/stage/actor
_REPORT_S = 0.2


class StageStartError(RuntimeError):
    """A stage could not load. Its text crosses process borders: Serve keeps only the traceback."""


class DiscoveryRouter(RequestRouter):
    """Routes nothing: it tells the gateway which replicas of a stage run, with the metadata they recorded."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls this on its router thread whenever the set of running replicas changes."""
        super().update_replicas(replicas)
        replica_feed.publish(self._deployment_id.name, [replica.replica_metadata for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Any replica will do: requests do not go to stages through Serve."""
        return [candidate_replicas]


class StageDeployment:
    """One stage as a Serve replica: starts a `stages.replica.StageReplica` and publishes where it listens."""

    async def __init__(self, index: int | None, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        module = importlib.import_module(STAGE_MODULE)
        context = ray.get_runtime_context()
        layers = "any" if index is None else f"{spec['start_layer']}-{spec['end_layer']}"
        log_to_stderr(spec.get("log_format", "text"), layers=layers)
        spec = {**spec, "host": spec.get("host") or ray.util.get_node_ip_address()}
        name = "spare" if index is None else f"stage {index} (layers {layers})"
        place = "spare" if index is None else index
        report = _StartReport(f"{serve.get_replica_context().app_name}/{place}", name)
        try:
            self._stage = getattr(module, STAGE_CLASS)(
                getattr(module, SPEC_CLASS).from_dict(spec), progress=report.progress
            )
            await self._stage.start()
        except Exception as error:
            typed = isinstance(error, StagelineError)
            cause = f"{error.reason}: {error.message}" if isinstance(error, StagelineError) else repr(error)
            problem = f"{name} cannot start: {cause}"
            report.failed(problem, "" if typed else traceback.format_exc())
            raise StageStartError(problem) from error
        report.started()
        self._node = context.get_node_id()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Serve calls this once, after `__init__`; the result travels with the deployment's membership."""
        return {**self._stage.metadata(), "node": self._node}

    def check_health(self) -> None:
        """Raise when the stage cannot work; Serve restarts the replica after three such answers."""
        self._stage.check_health()

    def __call__(self) -> dict[str, Any]:
        """What `record_replica_metadata` says, for people who ask through a handle."""
        return self.record_replica_metadata()

    async def __del__(self) -> None:
        if hasattr(self, "_stage"):
            await self._stage.drain()
            await self._stage.stop()


class _StartReport:
    """What one starting stage tells whoever typed `serve`. Small: one key while it loads, one for the last failure."""

    def __init__(self, place: str, name: str) -> None:
        self._failure_key = place
        self._key = f"{place}/{ray.get_runtime_context().get_actor_id()}"
        self._name, self._told_s = name, 0.0

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """At most five times a second, and at the end."""
        if done_bytes == total_bytes or time.monotonic() - self._told_s >= _REPORT_S:
            self._told_s = time.monotonic()
            self._put(self._key, done=done_bytes, total=total_bytes)

    def failed(self, problem: str, trace: str) -> None:
        """Leave the reason where `serve` finds it, however Serve words its own report."""
        internal_kv._internal_kv_del(self._key, namespace=_BOARD)
        self._put(self._failure_key, problem=problem, traceback=trace)

    def started(self) -> None:
        """Nothing is left behind."""
        for key in (self._key, self._failure_key):
            internal_kv._internal_kv_del(key, namespace=_BOARD)

    def _put(self, key: str, **values: Any) -> None:
        internal_kv._internal_kv_put(key, json.dumps({"name": self._name, **values}), namespace=_BOARD)


def start_reports(application: str) -> list[Mapping[str, Any]]:
    """What stages report: `name` with `done` and `total` bytes, or with `problem` and `traceback`."""
    keys = internal_kv._internal_kv_list(f"{application}/", namespace=_BOARD)
    values = [internal_kv._internal_kv_get(key, namespace=_BOARD) for key in sorted(keys)]
    return [json.loads(value) for value in values if value is not None]


def carry_lines(write: Callable[[str, str], None]) -> None:
    """From now on `write` gets each line that a replica writes to stdout or stderr, and the replica's name with its process id. Ray
    itself prints them with a prefix, and those alike once. Raises nothing for what `write` raises as an OSError: Ray would
    carry no further line."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher
    from ray._private.worker import filter_autoscaler_events

    def carry(data: Mapping[str, Any]) -> None:
        name = data.get("actor_name") or data.get("task_name") or "ray"
        lines = data.get("lines", [])
        # Ray prints only the events among the autoscaler's many lines.
        for line in filter_autoscaler_events(lines) if data.get("pid") == "autoscaler" else lines:
            with contextlib.suppress(OSError):
                write(line, f"{name} {data.get('pid')}")

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("ray_print_logs", carry)


def stage_application(
    name: str,
    index: int | None,
    spec: dict[str, Any],
    *,
    replicas: int | Mapping[str, Any],
    num_cpus: float,
    num_gpus: float,
    retries: int,
    drain_timeout_s: float,
) -> serve.Application:
    """One deployment for stage `index`, or without one for unbound spares; `retries` bounds constructor attempts before Serve
    reports a failure, and what is to stop gets a little longer than `drain_timeout_s`.

    `replicas` is their number, or the fields of Serve's AutoscalingConfig.
    """
    make: Any = serve.deployment  # its overloads do not know classes with an async __init__
    router: Any = "gateway.serve_adapter.DiscoveryRouter"
    deployment = make(StageDeployment).options(
        name=name,
        **({"num_replicas": replicas} if isinstance(replicas, int) else {"autoscaling_config": dict(replicas)}),
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=router),
        max_constructor_retry_count=retries,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
    )
    application: serve.Application = deployment.bind(index, spec)
    return application


def run_with_policy(application: str, builder: str, args: Mapping[str, Any], policy: Mapping[str, Any]) -> None:
    """Deploy as `serve deploy` does, since `serve.run` takes no application-level policy; wait until it runs.

    Raises RuntimeError, as `serve.run` does, where it cannot be deployed.
    """
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus, ServeDeploySchema

    client: Any = _get_global_client()
    declared = {"name": application, "route_prefix": "/", "import_path": builder, "args": dict(args)}
    client.deploy_apps(
        ServeDeploySchema.model_validate({"applications": [declared | {"autoscaling_policy": dict(policy)}]})
    )
    while True:
        found = serve.status().applications.get(application)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return
        if found is not None and found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise RuntimeError(found.message)
        time.sleep(0.2)
