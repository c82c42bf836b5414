"""The application with a bad network between its stages: each replica publishes the address of a FaultProxy before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

from ray import serve

from gateway import app, serve_adapter
from tests.chaos.fault_proxy import FaultProxy

DELAY_S = JITTER_S = 0.05


class ProxiedStage(serve_adapter.StageDeployment):
    """What comes to this stage, and what it answers, is 50 ± 50 ms late."""

    async def __init__(self, index: int | None, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        await super().__init__(index, spec)
        host, _, port = self._stage.address.rpartition(":")
        self._proxy = FaultProxy(host, int(port), seed=index or 0)
        self._proxy.delay_s, self._proxy.jitter_s = DELAY_S, JITTER_S
        self._address = await self._proxy.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """The proxy's address instead of the stage's."""
        return {**super().record_replica_metadata(), "address": self._address}

    async def __del__(self) -> None:
        await super().__del__()
        if hasattr(self, "_proxy"):
            await self._proxy.stop()


def build(args: Mapping[str, Any]) -> serve.Application:
    """`gateway.app:build` with these stages."""
    with mock.patch.object(serve_adapter, "StageDeployment", ProxiedStage):
        return app.build(args)
