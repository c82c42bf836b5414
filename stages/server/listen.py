"""Taking a port, with the reason where it cannot be had. No torch here."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from stageline.errors import ConfigError


def take_port(bind: Callable[[str], int], host: str, port: int) -> int:
    """The port that `bind("host:port")` (of a gRPC server) took; port 0 takes a free one.

    Raises ConfigError: PORT_OUT_OF_RANGE, PORT_IN_USE, PORT_NOT_ALLOWED or HOST_NOT_LOCAL.
    """
    if not 0 <= port <= 65535:  # gRPC would take it modulo 65536
        raise ConfigError("PORT_OUT_OF_RANGE", f"a port must be in [0, 65535], got {port}", field="port", port=port)
    try:
        return bind(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        raise _why(host, port) from None


def _why(host: str, port: int) -> ConfigError:
    """gRPC does not say why; the system does when asked for the same port."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except socket.gaierror as error:
        return ConfigError("HOST_NOT_LOCAL", f"cannot listen on {host}: {error.strerror}", field="host", host=host)
    except OSError as error:
        if error.errno == errno.EACCES:
            return ConfigError("PORT_NOT_ALLOWED", f"this user may not listen on {host}:{port}", port=port)
        if error.errno == errno.EADDRNOTAVAIL:
            return ConfigError(
                "HOST_NOT_LOCAL", f"cannot listen on {host}: it is no address of this machine", field="host", host=host
            )
    return ConfigError(
        "PORT_IN_USE", f"cannot listen on {host}:{port}; stop what listens there or choose another port", port=port
    )
