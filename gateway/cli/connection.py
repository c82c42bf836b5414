"""How `status`, `chat`, `bench` and `timeline` reach a server: its address, TLS, an API key."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from gateway.cli.servers import find
from stageline.errors import ConfigError

KEY_VARIABLE = "STAGELINE_API_KEY"

Options = tuple[tuple[str, int | str], ...]


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that calls a server. A key is no flag: every user of a host can read the arguments of its
    processes."""
    parser.add_argument("--address", metavar="HOST:GRPC_PORT", help="default: the server running on this host")
    parser.add_argument("--tls", action="store_true", help="speak TLS; the system's authorities are trusted")
    parser.add_argument("--ca-file", metavar="PEM", help="speak TLS; this authority is trusted")
    parser.add_argument("--certificate-file", metavar="PEM", help="our own certificate chain (mutual TLS)")
    parser.add_argument("--key-file", metavar="PEM", help="its private key")
    parser.add_argument("--server-name", help="name in the server's certificate, instead of the address")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"file with the API key; default: ${KEY_VARIABLE}")


@dataclass(frozen=True, slots=True)
class Connection:
    """Every call carries `metadata`."""

    address: str
    credentials: grpc.ChannelCredentials | None = None
    options: Options = ()
    metadata: tuple[tuple[str, str], ...] = ()

    def channel(self) -> grpc.Channel:
        """Plain text without credentials."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=self.options)
        return grpc.secure_channel(self.address, self.credentials, options=self.options)


def connection_from(args: argparse.Namespace) -> Connection:
    """What the flags say. Raises ConfigError where a file cannot be read, or there is no server to be found."""
    credentials, options = None, list[tuple[str, int | str]]()
    if args.tls or args.ca_file or args.certificate_file or args.key_file:
        if bool(args.certificate_file) != bool(args.key_file):
            raise ConfigError("TLS_INCOMPLETE", "--certificate-file and --key-file belong together; give both or none")
        credentials = grpc.ssl_channel_credentials(
            *(_read(path) if path else None for path in (args.ca_file, args.key_file, args.certificate_file))
        )
        if args.server_name:
            options.append(("grpc.ssl_target_name_override", args.server_name))
    key = api_key(args.api_key_file)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    return Connection(args.address or find(), credentials, tuple(options), metadata)


def api_key(path: str | None) -> str:
    """From the file, else from the environment; "" where there is none. Raises ConfigError for one that cannot be sent."""
    key = (_read(path).decode("ascii", "replace") if path else os.environ.get(KEY_VARIABLE, "")).strip()
    if not (key.isascii() and (key.isprintable())) or " " in key:  # the message must not say it
        raise ConfigError("API_KEY_INVALID", "an API key is printable ASCII without spaces", field="api_key")
    return key


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError("FILE_UNREADABLE", f"{path} cannot be read: {error.strerror}", path=path) from None
