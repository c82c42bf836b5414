"""How the clients connect: addresses, channel options, TLS, metadata."""

from __future__ import annotations

import logging
import re
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from stageline.errors import ConfigError, InvalidArgumentError, StagelineError

logger = logging.getLogger("stageline.client")

REQUEST_ID = "x-request-id"
MAX_MESSAGE_BYTES = 16 << 20  # as the server's default
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOptions:
    """`max_message_bytes` bounds a message either way. A peer that is silent for `keepalive_s` is pinged, and taken for dead
    `keepalive_timeout_s` later; servers allow a ping every 10 s."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    keepalive_s: float = 20.0
    keepalive_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if min(self.max_message_bytes, self.keepalive_s, self.keepalive_timeout_s) <= 0:
            raise ConfigError("CHANNEL_OPTION_OUT_OF_RANGE", f"channel options must be over 0, got {self}")

    def arguments(self) -> list[tuple[str, int | str]]:
        """As gRPC names them."""
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            # gRPC measures bandwidth with pings of its own. While one is out it sends no keepalive, and that one, too, must
            # not wait for its default of 60 s: it is the one that meets a peer which hangs in mid-stream.
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            # A client that only listens sends no data: without this, gRPC stops to ping after the second time.
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_retries", 0),  # we know what a repeated call means, gRPC does not
            # Our own backoff decides when to try again. (The minimum stays at its 20 s: it is the time that a connection
            # may take to come up, and one over a slow link takes seconds.)
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM bytes. Without `root_certificates` the system's are used; key and chain together are the client's own (mTLS).
    `server_name` is expected in the server's certificate in place of the address's host."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ConfigError("TLS_INCOMPLETE", "private_key and certificate_chain belong together; give both or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """For a secure channel."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


class Endpoints:
    """Addresses that serve the same model, and what every call to them carries.

    All calls go to one address until it fails, then to the next: failover, not load balancing. Safe to use from several
    threads: each operation is one read or one write.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        tls: Tls | None,
        api_key: str | None,
        metadata: Sequence[tuple[str, str]],
        channel: ChannelOptions | None,
    ) -> None:
        """Raises ConfigError where there is no address or the key cannot stand in a header."""
        self._addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        if not self._addresses or not all(self._addresses):
            raise ConfigError("ADDRESS_MISSING", "expected at least one HOST:PORT", field="addresses")
        if api_key is not None and _PRINTABLE.fullmatch(api_key) is None:  # the message must not say the key
            raise ConfigError("API_KEY_INVALID", "an API key is printable ASCII without spaces", field="api_key")
        key = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._metadata = (*metadata, *key)
        self._place = 0
        self.tls = tls
        self.options = (channel or ChannelOptions()).arguments()
        if tls is not None and tls.server_name is not None:
            self.options.append(("grpc.ssl_target_name_override", tls.server_name))

    def address(self) -> str:
        """Where the next attempt goes."""
        return self._addresses[self._place]

    def failed(self, address: str, error: StagelineError, wait_s: float) -> None:
        """An attempt failed and another follows, at the next address unless another call has moved on already."""
        logger.warning("%s: %s [%s]; trying again in %.2f s", address, error.message, error.reason, wait_s)
        place = self._place
        if self._addresses[place] == address:
            self._place = (place + 1) % len(self._addresses)

    def metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """Of a call: one name for all of its attempts, in the server's logs."""
        return (*self._metadata, *trace_context(), (REQUEST_ID, request_id))


def trace_context() -> tuple[tuple[str, str], ...]:
    """Of the caller's current span: W3C `traceparent`, `tracestate` and what else the process propagates.

    Empty in a process that does not use opentelemetry, which the client does not need.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def name_of_request(given: str) -> str:
    """The caller's name of the request, drawn where there is none. Raises InvalidArgumentError for one that cannot stand in
    a header."""
    if given and (_PRINTABLE.fullmatch(given) is None or len(given) > 128):
        raise InvalidArgumentError(
            "REQUEST_ID_INVALID",
            f"request_id must be 1 to 128 printable ASCII characters without spaces, got {given[:32]!r}",
            field="request_id",
        )
    return given or uuid.uuid4().hex
