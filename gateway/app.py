"""The composition root: builds the Ray Serve application, and inside the gateway replica the engine and its doors.

serve run gateway.app:build model=/models/qwen2 stages=4
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve

from gateway import config as configuration
from gateway import replica_feed
from gateway.access import Audit, Doorkeeper
from gateway.api.grpc.server import serve_grpc
from gateway.api.http.app import create_http_app
from gateway.api.service import Frontend
from gateway.batch.opening import open_batches
from gateway.batch.service import BatchService
from gateway.engine import Engine, EngineSettings
from gateway.model import configured_template, load_model
from gateway.pipelines.discovery import Registry, ReplicaRecord
from gateway.planner.split import resolve_layers
from gateway.serve_adapter import stage_application
from gateway.tracing.call import open_tracing
from stageline.errors import ConfigError
from stages.checkpoint import open_checkpoint
from stages.logs import log_to_stderr
from stages.partition import LayerRange
from stages.server.access import StageAccess

logger = logging.getLogger("stageline.gateway")

SPARE_DEPLOYMENT = "spare"  # not stage-…: it is not scaled with them
METRICS_INTERVAL_S = 1.0
"""How often Serve asks the gateway what it has to do."""

_frontend: Frontend | None = None
_batches: BatchService | None = None


def build(args: Mapping[str, Any]) -> serve.Application:
    """Serve's application builder, for `serve run` and `serve deploy`.

    `args` is a configuration: sections with fields, `section.field` keys, and the short names of the command line's
    flags (`model`, `stages`, `layers`, `dtype`, `quantization`, `grpc_port`). Raises ConfigError for an unknown key, a wrong value, a
    field given twice, and for the HTTP door's address, which is Serve's own (`http_options`).
    """
    nested: dict[str, dict[str, Any]] = {}
    for key, value in args.items():
        if isinstance(value, Mapping):
            pairs = [(f"{key}.{field}", one) for field, one in value.items()]
        else:
            pairs = [(configuration.SHORT_NAMES.get(key, key), value)]
        for name, one in pairs:
            section, _, field = name.partition(".")
            if field in nested.setdefault(section, {}):
                raise ConfigError("CONFIG_TWICE", f"the application's arguments give {name} twice", field=name)
            nested[section][field] = one
    if "http_port" in nested.get("server", {}):
        raise ConfigError(
            "CONFIG_NOT_OURS", "under `serve run` and `serve deploy` the HTTP port is Serve's: set http_options.port",
            field="server.http_port",
        )  # fmt: skip
    return application(configuration.from_mapping(nested, source="the application's arguments"))


def application(config: configuration.Config) -> serve.Application:
    """One deployment a stage, one of unbound spares if there are any, and one for the gateway.

    Raises StagelineError where the model or the split is wrong.
    """
    if not config.model.path:
        raise ConfigError("MODEL_MISSING", "model is required: a folder, a .gguf file, or a hub id", field="model.path")
    # Paths must mean the same in the replicas, which run elsewhere.
    config = config.model_copy(
        update={name: getattr(config, name).absolute() for name in ("model", "security", "batch")}
    )
    configured_template(
        config.model
    )  # a user hears of a wrong path here; from the replica it would be a failed deployment
    checkpoint = open_checkpoint(config.model.path, revision=config.model.revision)
    ranges = resolve_layers(checkpoint.config, config.stages.count, config.stages.layers)

    def deploy(
        name: str, index: int | None, layers: LayerRange | None, number: int | Mapping[str, Any]
    ) -> serve.Application:
        return stage_application(
            name,
            index,
            stage_spec(config, layers, len(ranges)),
            replicas=number,
            num_cpus=config.stages.num_cpus,
            num_gpus=config.stages.num_gpus,
            retries=3,
            drain_timeout_s=config.stages.drain_timeout_s,
        )

    stages = [deploy(f"stage-{index}", index, layers, replicas(config)) for index, layers in enumerate(ranges)]
    if config.stages.spares:
        stages.append(deploy(SPARE_DEPLOYMENT, None, None, config.stages.spares))
    make: Any = serve.deployment  # its overloads do not know classes with an async __init__
    gateway = make(serve.ingress(_http_app)(Gateway)).options(
        name="gateway",
        # Serve collects a replica's own metrics only where it has an autoscaling config.
        autoscaling_config={"min_replicas": 1, "max_replicas": 1, "metrics_interval_s": METRICS_INTERVAL_S},
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=config.server.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
    )
    bound: serve.Application = gateway.bind(config.model_dump(), *stages)
    return bound


def replicas(config: configuration.Config) -> int | dict[str, Any]:
    """Of every stage: a number, or alike for all of them the bounds and delays within which demand decides."""
    pipelines = config.pipelines
    if pipelines.max is None:
        return config.stages.replicas
    return {
        "min_replicas": pipelines.min,
        "initial_replicas": max(1, pipelines.min),
        "max_replicas": pipelines.max,
        "upscale_delay_s": pipelines.scale_up_delay_s,
        "downscale_delay_s": pipelines.idle_s,
    }


def autoscaling_policy(config: configuration.Config) -> dict[str, Any]:
    """The application's `autoscaling_policy`, as a Serve configuration file takes it. Without it stages would not scale
    in lockstep, so a file that sets `pipelines.max` must have it."""
    return {
        "policy_function": "gateway.autoscale.policy:LockstepPolicy",
        "policy_kwargs": {"sequences": config.pipelines.target_sequences},
    }


def stage_spec(config: configuration.Config, layers: LayerRange | None, num_stages: int) -> dict[str, Any]:
    """What a replica needs to know, as `stages.replica.StageSpec.from_dict` takes it; without layers, an unbound spare."""
    threads = config.stages.num_threads or max(1, (os.cpu_count() or 1) // num_stages)
    return {
        "model": config.model.path,
        "revision": config.model.revision,
        "start_layer": None if layers is None else layers.start_layer,
        "end_layer": None if layers is None else layers.end_layer,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "hidden_dtype": config.stages.hidden_dtype,
        "device": config.stages.device,
        "batch_invariant": config.model.batch_invariant,
        "debug_kv": config.kv_cache.debug,
        "cuda_graphs": config.stages.cuda_graphs,
        "block_size_tokens": config.block_size_tokens(),
        "kv_memory_bytes": config.kv_cache.memory_bytes,
        "num_blocks": config.kv_cache.num_blocks,
        "num_threads": threads,
        "host": config.stages.host,
        "shared_memory_bytes": config.stages.shared_memory_bytes,
        "stall_timeout_s": 2 * config.pipelines.stall_timeout_s,
        "drain_timeout_s": config.stages.drain_timeout_s,
        "log_format": config.server.log_format,
        **config.security.stage_files(),
    }


def _http_app() -> FastAPI:
    return create_http_app(_current_frontend, batches_getter=lambda: _batches)


def _current_frontend() -> Frontend:
    assert _frontend is not None, "Serve routes HTTP only after Gateway.__init__"
    return _frontend


class Gateway:
    """The Serve replica that owns the engine, the gRPC door, and the HTTP door behind Serve's ingress."""

    async def __init__(self, config: dict[str, Any], *stages: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        global _frontend, _batches
        parsed = configuration.Config.model_validate(config)
        log_to_stderr(parsed.server.log_format)
        security = parsed.security
        tls = security.door_tls()
        self._tracing = open_tracing(parsed.tracing)
        doorkeeper = Doorkeeper(security.keys_file, Audit(security.audit_file, prompts=security.audit_prompts))
        model, tokenizer, template = await asyncio.to_thread(load_model, parsed)
        registry = Registry()
        loop = asyncio.get_running_loop()

        def on_replicas(deployment: str, replicas: Sequence[Mapping[str, Any]]) -> None:
            records = [ReplicaRecord(**replica) for replica in replicas]
            loop.call_soon_threadsafe(registry.set_replicas, deployment, records)

        replica_feed.subscribe(on_replicas)
        # A handle starts its router, and with it the stream of memberships, only once it is configured.
        self._stages = [handle.options(method_name="__call__") for handle in stages]
        settings = EngineSettings(
            max_step_tokens=parsed.scheduler.max_step_tokens,
            max_step_sequences=parsed.scheduler.max_step_sequences,
            min_prefill_tokens=parsed.scheduler.min_prefill_tokens,
            max_waiting_sequences=parsed.scheduler.max_waiting_sequences,
            max_waiting_tokens=parsed.scheduler.max_waiting_tokens,
            max_request_kv_fraction=parsed.scheduler.max_request_kv_fraction,
            prefix_caching=parsed.kv_cache.prefix_caching,
            lease_s=parsed.pipelines.lease_s,
            eager_pipelines=parsed.pipelines.eager,
            patience_s=parsed.pipelines.patience_s,
            stall_timeout_s=parsed.pipelines.stall_timeout_s,
            stage_access=StageAccess(**security.stage_files()),
            canary_interval_s=parsed.pipelines.canary_interval_s,
            unready_after_s=parsed.pipelines.unready_after_s,
            superseded_after_s=parsed.pipelines.superseded_after_s,
            max_unread_tokens=parsed.server.max_unread_tokens,
            max_unread_tokens_total=parsed.server.max_unread_tokens_total,
        )
        self._drain_s = parsed.server.drain_timeout_s
        self._engine = Engine(
            model=model, tokenizer=tokenizer, registry=registry, settings=settings, fingerprint=model.fingerprint
        )
        await self._engine.start()
        _frontend = Frontend(self._engine, tokenizer, template, model, doorkeeper, self._tracing)
        _batches = self._batches = await open_batches(_frontend, parsed.batch)
        if self._batches is not None:
            self._engine.batch_backlog_tokens = self._batches.backlog_tokens
        self._grpc = await serve_grpc(
            _frontend,
            parsed.server.host,
            parsed.server.grpc_port,
            tls=tls,
            with_reflection=security.reflection,
            write_timeout_s=parsed.server.write_timeout_s,
            batches=self._batches,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve carries these numbers to the policy."""
        return self._engine.demand().stats()

    async def __del__(self) -> None:
        if hasattr(self, "_grpc"):
            await self._grpc.stop(self._drain_s)
        if (batches := getattr(self, "_batches", None)) is not None:
            await batches.stop()
        if hasattr(self, "_engine"):
            await self._engine.stop(self._drain_s)
        if (tracing := getattr(self, "_tracing", None)) is not None:
            await tracing.stop()
