"""The processes of benchmarks/recovery_cost.py: a stage, or a gateway, as it is or with its readiness for failures switched off.

    python -m benchmarks.recovery_parts stage on|off [arguments of `python -m stages`]
    python -m benchmarks.recovery_parts gateway on|off MODEL ADDRESS...

What a setting can switch off is a setting here. For the rest this file replaces methods, in its own processes: the product
has no switch for it, since a pipeline without it is of no use to anybody.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable
from typing import Any

NEVER_S = 1e6
OFF_SETTINGS = {
    "lease_s": NEVER_S,  # renewed four times in each
    "canary_interval_s": NEVER_S,
    "unready_after_s": NEVER_S,
    "stall_timeout_s": NEVER_S,
    "superseded_after_s": NEVER_S,
}
SWITCHED_OFF = {
    "settings of the gateway": sorted(OFF_SETTINGS),
    "replaced in the gateway": [
        "Watch streams to the stages", "order of results (StepWindow)", "search for leaks when idle",
        "watch for other models", "membership: stages are asked once a second what they are", "keepalive pings",
    ],
    "replaced in the stages": [
        "order of steps (Intake)", "end of leases", "the fence of data streams (until_over)",
        "which step runs and since when", "zeroing of fresh KV blocks", "keepalive pings",
    ],
    "on in both": [
        "epochs in frames", "the gateway's record of steps that are out (without it no result can be read)",
        "non-finite rows", "step timings", "the canary before a pipeline serves",
    ],
}  # fmt: skip


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()


async def _nothing(*_: Any) -> None:
    return


def _without_keepalive(*modules: Any) -> None:
    for module in modules:
        module.OPTIONS = tuple(pair for pair in module.OPTIONS if "keepalive" not in pair[0])


def switch_off_stage() -> None:
    """In this process."""
    from stages.kv_cache.paged import KVCache
    from stages.server import epoch, link, server
    from stages.server.intake import Intake

    def execute(self: Any, frame: Any, received_ns: int) -> Any:
        try:
            return self._executor.execute(frame, received_ns)
        finally:
            if frame.give_back is not None:
                frame.give_back()

    async def until_over(self: Any, work: Awaitable[Any]) -> Any:
        return await work

    replaced: list[tuple[Any, str, Any]] = [
        (Intake, "admit", lambda self, **_: self),
        (epoch.Epoch, "_execute", execute),
        (epoch.Epoch, "until_over", until_over),
        (server.StageServer, "_lease_loop", _never),
        (KVCache, "clear", lambda self, blocks: None),
    ]
    for owner, name, method in replaced:
        assert hasattr(owner, name), f"{owner.__name__} has no {name} any more: this benchmark is out of date"
        setattr(owner, name, method)
    _without_keepalive(link, server)


class _NoWindow:
    """Takes the place of StepWindow."""

    oldest = None

    def send(self, step_id: int) -> _NoWindow:
        return self

    take = send


def switch_off_gateway() -> None:
    """In this process."""
    from gateway.engine.engine import Engine
    from gateway.pipelines import discovery, pipeline

    replaced: list[tuple[Any, str, Any]] = [
        (pipeline.Pipeline, "_watch_all", _nothing),
        (pipeline, "StepWindow", _NoWindow),
        (Engine, "_check_when_idle", _never),
        (Engine, "_watch_model", _never),
        (discovery.StaticDiscovery, "_run", _never),
    ]
    for owner, name, method in replaced:
        assert hasattr(owner, name), f"{owner.__name__} has no {name} any more: this benchmark is out of date"
        setattr(owner, name, method)
    _without_keepalive(discovery, pipeline)


async def gateway(model: str, addresses: list[str], settings: dict[str, Any]) -> None:
    """The gRPC door over stages, until SIGTERM."""
    from gateway.api.grpc.server import serve_grpc
    from gateway.api.service import Frontend
    from gateway.config import Config, ModelSection
    from gateway.engine import Engine, EngineSettings
    from gateway.model import load_model
    from gateway.pipelines.discovery import Registry, StaticDiscovery

    info, tokenizer, template = load_model(Config(model=ModelSection(path=model)))
    registry = Registry()
    engine = Engine(
        model=info, tokenizer=tokenizer, registry=registry, settings=EngineSettings(**settings),
        fingerprint=info.fingerprint,
    )  # fmt: skip
    await engine.start()
    discovery = StaticDiscovery(addresses, registry)
    await discovery.start()
    await asyncio.wait_for(engine.wait_ready(), 60)
    server = await serve_grpc(Frontend(engine, tokenizer, template, info), "127.0.0.1", 0)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"ready grpc://127.0.0.1:{server.port}", flush=True)
    await stop.wait()
    await discovery.stop()
    await server.stop(0)
    await engine.stop()


def main() -> int:
    """See the module's docstring."""
    part, switch, *arguments = sys.argv[1:]
    off = {"on": False, "off": True}[switch]
    if part == "stage":
        from stages.__main__ import main as serve_stage

        if off:
            switch_off_stage()
        sys.argv = ["stages", *arguments]
        return serve_stage()
    if off:
        switch_off_gateway()
    asyncio.run(gateway(arguments[0], arguments[1:], OFF_SETTINGS if off else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
