"""One running stage: loads its layers, or as an unbound spare none yet, and serves them. Knows nothing of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from stageline.errors import InternalError
from stages.loading import ModelLoader, on_ending_thread
from stages.server.access import StageAccess
from stages.server.server import Listener, StageServer
from stages.spec import ACCESS_FIELDS, StageSpec

__all__ = ["StageReplica", "StageSpec"]


class StageReplica:
    """Loads and serves the stage of a StageSpec.

    `progress(done_bytes, total_bytes)` is called on the loading thread; without it a bar is drawn where stderr is a
    terminal.
    """

    def __init__(self, spec: StageSpec, progress: Callable[[int, int], None] | None = None) -> None:
        self.spec, self._progress = spec, progress
        self.address = ""
        self._server: StageServer | None = None
        self._metadata: dict[str, Any] = {}

    async def start(self) -> None:
        """Load the weights, of a spec with layers, and listen. Raises CheckpointError or ConfigError."""
        spec = self.spec
        access = StageAccess(**{name: getattr(spec, name) for name in ACCESS_FIELDS})
        listener = Listener(spec.host, spec.port, access)
        loader = await on_ending_thread(lambda: ModelLoader(spec, self._progress))
        loaded = None if spec.layers is None else await loader.load(spec.layers)
        self._server = StageServer(
            None if loaded is None else loaded.executor,
            fingerprint=loader.fingerprint,
            kv_capacity_blocks=0 if loaded is None else loaded.kv_capacity_blocks,
            queue_depth_steps=spec.queue_depth_steps,
            shared_memory_bytes=spec.shared_memory_bytes,
            loader=loader if loaded is None else None,
        )
        port = await self._server.start_on(listener)
        self.address = f"{spec.host}:{port}"
        self._metadata = {
            "address": self.address,
            "incarnation": self._server.incarnation,
            "fingerprint": loader.fingerprint,
            "start_layer": spec.start_layer or 0,
            "end_layer": spec.end_layer or 0,
            "num_layers": loader.num_layers,
            "pid": os.getpid(),
            "node": spec.host,
        }
        if loaded is None:
            self._metadata |= {"bindable": True, "memory_bytes": loader.memory_bytes}

    def metadata(self) -> dict[str, Any]:
        """Where this replica is and what it was when it started; plain values."""
        return dict(self._metadata)

    def check_health(self) -> None:
        """Raises InternalError where the stage cannot compute any more."""
        if self._server is not None and self._server.busy_s() > self.spec.stall_timeout_s:
            raise InternalError("STAGE_STALLED", f"one step has been running for {self._server.busy_s():.0f} s")
        if self._server is None or self._server.failure is not None:
            raise InternalError(
                "STAGE_UNHEALTHY", f"the stage stopped computing: {self._server and self._server.failure!r}"
            )

    async def drain(self) -> None:
        """Take no new claim, tell the owner, and wait until it let go of this stage, for at most `spec.drain_timeout_s`."""
        if self._server is not None:
            await self._server.drain(self.spec.drain_timeout_s)
            await self._server.drained()

    async def stop(self) -> None:
        """End everything."""
        if self._server is not None:
            await self._server.stop()
