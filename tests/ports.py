"""Ports of this machine that nobody listens on."""

from __future__ import annotations

from gateway.cli.ports import free_port


def free_ports(count: int) -> list[int]:
    """All different. Whoever listens first has one; nothing keeps them until then."""
    ports: list[int] = []
    while len(ports) < count:
        ports.append(free_port("127.0.0.1", avoid=ports))
    return ports
