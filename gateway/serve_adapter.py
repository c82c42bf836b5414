"""The only module that touches Ray Serve's alpha surfaces: replica metadata and request routers (Ray 2.60).

Serve imports it in the controller, in stage replicas and in the gateway, so it must stay light: the stage itself is
loaded by name inside the replica that runs it, and the gateway process never loads torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from gateway import replica_feed
from stageline.errors import StagelineError

STAGE_MODULE, STAGE_CLASS, SPEC_CLASS = "stages.replica", "StageReplica", "StageSpec"


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

    async def __init__(self, index: int, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        module = importlib.import_module(STAGE_MODULE)
        context = ray.get_runtime_context()
        spec = {**spec, "host": spec.get("host") or ray.util.get_node_ip_address()}
        try:
            self._stage = getattr(module, STAGE_CLASS)(getattr(module, SPEC_CLASS).from_dict(spec))
            await self._stage.start()
        except StagelineError as error:
            layers = f"{spec['start_layer']}-{spec['end_layer']}"
            raise StageStartError(
                f"stage {index} (layers {layers}) cannot start: {error.reason}: {error.message} <end>"
            ) from error
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


def stage_application(
    name: str, index: int, spec: dict[str, Any], *, replicas: int, num_cpus: float, num_gpus: float, retries: int
) -> serve.Application:
    """One deployment for stage `index`; `retries` bounds constructor attempts before Serve reports a failure."""
    make: Any = serve.deployment  # its overloads do not know classes with an async __init__
    router: Any = "gateway.serve_adapter.DiscoveryRouter"
    deployment = make(StageDeployment).options(
        name=name,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=router),
        max_constructor_retry_count=retries,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    application: serve.Application = deployment.bind(index, spec)
    return application
