"""How the clients connect: channel options, TLS, metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from stageline.errors import ConfigError

MAX_MESSAGE_BYTES = 16 << 20  # as the server's default

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),  # the server allows a ping every 10 s; finds a peer behind a silent network
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),  # we know what a repeated call means, gRPC does not
    ("grpc.initial_reconnect_backoff_ms", 100),  # our own backoff decides when to try again
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM bytes. Without `root_certificates` the system's are used; key and chain together are the client's own (mTLS)."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a secure channel."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Addresses that serve the same model, tried in turn, and what every call carries."""

    addresses: tuple[str, ...]
    metadata: tuple[tuple[str, str], ...]
    tls: Tls | None

    @classmethod
    def make(
        cls, addresses: str | Sequence[str], tls: Tls | None, api_key: str | None, metadata: Sequence[tuple[str, str]]
    ) -> Endpoints:
        """Raises ConfigError where there is no address."""
        listed = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        if not listed or not all(listed):
            raise ConfigError("ADDRESS_MISSING", "expected at least one HOST:PORT", field="addresses")
        key = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        return cls(listed, (*metadata, *key), tls)

    def address(self, attempt: int) -> str:
        """Where the attempt with this number goes."""
        return self.addresses[attempt % len(self.addresses)]
