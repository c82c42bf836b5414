"""Binds spares to stages, and knows what bindable replicas hold: the calls for what binding.py decides."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from gateway.pipelines.binding import Binding
from gateway.pipelines.discovery import Registry, ReplicaRecord, describe
from stageline.errors import StagelineError, UnavailableError
from stageline.grpc_errors import from_rpc_error
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.partition import LayerRange
from stages.server.access import OPEN, StageAccess
from stages.server.link import OPTIONS

logger = logging.getLogger("stageline.gateway")

CALL_TIMEOUT_S = 5.0
POLL_S = 0.1  # how often a load is looked at
WATCH_S = 1.0  # how often all bindable replicas are
PASS_OVER_S = 5.0  # how long a spare is passed over that could not be bound
TOO_LARGE_S = 600.0  # the same where the stage did not fit into it
_LOST_RACE = ("STAGE_CLAIMED", "STAGE_LOADING", "STALE_EPOCH", "STAGE_CONNECTED")


class Binder:
    """The bindings of one gateway. Lives on one event loop; `on_change` is called when a binding has ended, either way."""

    def __init__(
        self,
        registry: Registry,
        *,
        owner_id: str,
        lease_s: float,
        on_change: Callable[[], None],
        access: StageAccess = OPEN,
    ) -> None:
        self._registry, self._owner_id, self._lease_s, self._access = registry, owner_id, lease_s, access
        self._on_change = on_change
        self._loading: dict[str, tuple[str, LayerRange]] = {}  # incarnation → for whom, and what
        self._passed_over: dict[str, float] = {}  # incarnation → until when, on the monotonic clock
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to ask bindable replicas what they hold: other gateways bind them too."""
        self._spawn(self._watch())

    async def stop(self) -> None:
        """Wait for no load; what is loading goes on and belongs to nobody once its lease ran out."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def loading(self, lane: str) -> tuple[LayerRange, ...]:
        """Stages that are being loaded for a lane."""
        return tuple(layers for name, layers in self._loading.values() if name == lane)

    def passed_over(self) -> set[str]:
        """Replicas that are not to be bound now."""
        now_s = time.monotonic()
        self._passed_over = {name: until_s for name, until_s in self._passed_over.items() if until_s > now_s}
        return {*self._passed_over, *self._loading}

    def bind(self, binding: Binding, lane: str) -> None:
        """Have it loaded, in the background. The replica is ours to claim then, and the registry says what it holds."""
        self._loading[binding.replica.incarnation] = lane, binding.layers
        self._spawn(self._bind(binding))

    async def _bind(self, binding: Binding) -> None:
        name, layers, where = binding.replica.incarnation, binding.layers, binding.replica.address
        started_s = time.monotonic()
        extra = {"layers": str(layers)}
        logger.info("layers %s are missing: the spare at %s loads them", layers, where, extra=extra)
        try:
            async with self._access.channel(where, OPTIONS) as channel:
                await self._load(pb_grpc.StageServiceStub(channel), binding)
            self._registry.hold(name, layers.start_layer, layers.end_layer)
            took_s = time.monotonic() - started_s
            logger.info("the spare at %s holds layers %s after %.1f s", where, layers, took_s, extra=extra)
        except StagelineError as error:
            level = logging.INFO if error.reason in _LOST_RACE else logging.WARNING  # another gateway was first
            logger.log(
                level,
                "the spare at %s is not bound to layers %s: %s: %s",
                where,
                layers,
                error.reason,
                error,
                extra=extra,
            )
            too_large = error.reason == "STAGE_TOO_LARGE"
            self._passed_over[name] = time.monotonic() + (TOO_LARGE_S if too_large else PASS_OVER_S)
        finally:
            del self._loading[name]
            self._on_change()

    async def _load(self, stub: Any, binding: Binding) -> None:
        """Returns once the replica holds the stage. Raises StagelineError where it refuses, fails or is gone."""
        name, layers = binding.replica.incarnation, binding.layers
        try:
            seen = await stub.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S)
            request = pb.BindRequest(
                owner_id=self._owner_id, incarnation=name, epoch=seen.epoch, lease_s=self._lease_s,
                start_layer=layers.start_layer, end_layer=layers.end_layer,
            )  # fmt: skip
            epoch = (await stub.Bind(request, timeout=CALL_TIMEOUT_S)).epoch
            renew_s = time.monotonic() + self._lease_s / 4
            while True:
                now = await stub.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S)
                if (now.start_layer, now.end_layer) == (layers.start_layer, layers.end_layer):
                    return
                if now.incarnation != name or not now.HasField("loading"):
                    raise UnavailableError("BIND_FAILED", now.load_failure or "the replica was restarted")
                if now.epoch == epoch and time.monotonic() >= renew_s:
                    renew_s = time.monotonic() + self._lease_s / 4
                    await stub.Renew(pb.RenewRequest(epoch=epoch, incarnation=name), timeout=CALL_TIMEOUT_S)
                await asyncio.sleep(POLL_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def _watch(self) -> None:
        while True:
            asked = [one for one in self._registry.replicas() if one.bindable and one.incarnation not in self._loading]
            await asyncio.gather(*(self._look(one) for one in asked))
            await asyncio.sleep(WATCH_S)

    async def _look(self, one: ReplicaRecord) -> None:
        try:
            now = await describe(one.address, WATCH_S, self._access)
        except StagelineError:
            return  # the registry's source finds out whether it is gone
        if now.incarnation == one.incarnation and one.incarnation not in self._loading:
            self._registry.hold(one.incarnation, now.start_layer, now.end_layer, loading=now.HasField("loading"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
