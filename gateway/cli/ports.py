"""Ports that nobody listens on."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Container
from pathlib import Path

# Beyond the ports of Ray's workers, before those that the kernel gives by itself.
FIRST, LAST = 20_000, 29_999
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
TRIES = 20


def free_port(host: str, avoid: Container[int] = ()) -> int:
    """A port that will most likely still be free when somebody listens on it, seconds later.

    One that the kernel chose may be the source port of anybody's connection a moment later, and Ray opens hundreds while it starts.
    So it is taken from outside the kernel's range where there is room.

    Raises:
        OSError: nothing can listen on `host`.
    """
    candidates = range(FIRST, _last() + 1)
    for port in (*random.sample(candidates, min(TRIES, len(candidates))), *(0,) * TRIES):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            chosen = int(probe.getsockname()[1])
        if chosen not in avoid:
            return chosen
    raise OSError(errno.EADDRINUSE, f"no free port found on {host}")


def _last() -> int:
    try:
        first_of_kernel = int(EPHEMERAL.read_text().split()[0])
    except OSError:  # not Linux
        return LAST
    return min(LAST, first_of_kernel - 1)
