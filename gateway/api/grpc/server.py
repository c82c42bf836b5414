"""The public gRPC server: InferenceService, health that follows the engine, reflection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.api.grpc.batch import BatchServicer
from gateway.api.grpc.door import Door
from gateway.api.grpc.interceptor import TypedErrors
from gateway.api.grpc.operations import OperationsServicer
from gateway.api.grpc.servicer import InferenceServicer
from gateway.api.grpc.tracing import Traced
from gateway.api.service import Frontend
from gateway.batch.service import BatchService
from stageline.batch.v1 import batch_service_pb2 as batch_pb
from stageline.batch.v1 import batch_service_pb2_grpc as batch_pb_grpc
from stageline.errors import ConfigError
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc
from stageline.operations.v1 import operations_service_pb2 as operations_pb
from stageline.operations.v1 import operations_service_pb2_grpc as operations_pb_grpc
from stages.tls import TlsFiles

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
BATCHES = batch_pb.DESCRIPTOR.services_by_name["BatchService"].full_name
OPERATIONS = operations_pb.DESCRIPTOR.services_by_name["OperationsService"].full_name
MAX_MESSAGE_BYTES = 16 * 2**20  # a prompt of 131,072 ids is half a MiB; as text, a few MiB
HEALTH_PERIOD_S = 0.1
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server that takes half the calls
    # gRPC drops calls that we have not taken up yet, at random from 1,000 on, with CANCELLED, which tells a client nothing.
    # We take a call up in a fraction of a millisecond and refuse it ourselves, with a reason and a time to come back.
    ("grpc.server.max_pending_requests", 8192),
    ("grpc.server.max_pending_requests_hard_limit", 16384),
    ("grpc.server_max_unrequested_time_in_server", 600),  # seconds; the same fate after 30 otherwise
    # Find dead clients behind silent networks: their sequences hold KV blocks.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # While a ping of gRPC's own is out (it measures bandwidth) there is no keepalive: that ping must time out as well.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as every 10 s, streaming or idle.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 4),
)


class GrpcServer:
    """A running server. `port` is the one that was bound, also where 0 was asked for."""

    def __init__(self, server: grpc.aio.Server, port: int, health_servicer: Any) -> None:
        self.port = port
        self._server, self._health = server, health_servicer
        self._health_task: asyncio.Task[None] | None = None

    def follow(self, ready: Callable[[], bool]) -> None:
        """Keep the health service at what `ready` says."""
        self._health_task = asyncio.create_task(self._follow(ready))

    async def stop(self, grace_s: float | None = None) -> None:
        """Report NOT_SERVING, take no new calls, give running ones `grace_s` seconds, then cancel them."""
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _follow(self, ready: Callable[[], bool]) -> None:
        before: bool | None = None
        while True:
            if (now := ready()) is not before:
                await set_health(self._health, now)
                before = now
            await asyncio.sleep(HEALTH_PERIOD_S)


async def set_health(servicer: Any, serving: bool) -> None:
    """For the server as a whole ("") and for InferenceService; OperationsService needs no pipeline."""
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", SERVICE):
        await servicer.set(service, status)
    await servicer.set(OPERATIONS, health_pb2.HealthCheckResponse.SERVING)


async def serve_grpc(
    frontend: Frontend,
    host: str,
    port: int,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    tls: TlsFiles | None = None,
    with_reflection: bool = True,
    write_timeout_s: float = 600.0,
    batches: BatchService | None = None,
) -> GrpcServer:
    """Listen and serve until `stop`; with `tls` in TLS only. Raises ConfigError where the address cannot be bound.

    A stream ends when one of its messages has waited `write_timeout_s` for its reader. Without `batches` BatchService is
    not served.
    """
    options = {
        **dict(OPTIONS),
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": max_message_bytes,
    }
    ours = (SERVICE, OPERATIONS) if batches is None else (SERVICE, OPERATIONS, BATCHES)
    door = Door(frontend.doorkeeper, visited=ours, operators=(OPERATIONS,), open_to_all=(health.SERVICE_NAME,))
    traced = () if frontend.tracing is None else (Traced(frontend.tracing, ours),)
    interceptors = (door, *traced, TypedErrors(ours, write_timeout_s))
    server = grpc.aio.server(options=tuple(options.items()), interceptors=interceptors)
    pb_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(frontend), server)
    operations_pb_grpc.add_OperationsServiceServicer_to_server(OperationsServicer(frontend), server)
    if batches is not None:
        batch_pb_grpc.add_BatchServiceServicer_to_server(BatchServicer(batches), server)
    health_servicer = vars(health)["aio"].HealthServicer()  # health.aio, which some type stubs leave out
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if with_reflection:
        reflection.enable_server_reflection((*ours, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        address = f"{host}:{port}"
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls.server_credentials())
    except RuntimeError:
        raise ConfigError(
            "PORT_IN_USE",
            f"cannot listen on {host}:{port}; stop what listens there, or set another server.grpc_port",
            field="server.grpc_port", host=host, port=port,
        ) from None  # fmt: skip
    await set_health(health_servicer, frontend.engine.ready())
    await server.start()
    running = GrpcServer(server, bound, health_servicer)
    running.follow(frontend.engine.ready)
    return running
