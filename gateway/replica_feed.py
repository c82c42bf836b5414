"""Stage replicas as Serve sees them, handed from the router's thread to the gateway. No Ray here.

Serve pickles router classes by value, so what they share with the gateway must live in a module of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Listener = Callable[[str, Sequence[Mapping[str, Any]]], None]

_lock = threading.Lock()
_latest: dict[str, Sequence[Mapping[str, Any]]] = {}
_listeners: list[Listener] = []


def publish(deployment: str, replicas: Sequence[Mapping[str, Any]]) -> None:
    """Replace what is known of a deployment's running replicas: the metadata each of them recorded."""
    with _lock:
        _latest[deployment] = replicas
        listeners = list(_listeners)
    for listener in listeners:
        listener(deployment, replicas)


def subscribe(listener: Listener) -> None:
    """Call `listener(deployment, replicas)` now for what is known and then on every change, on the router's thread."""
    with _lock:
        _listeners.append(listener)
        known = list(_latest.items())
    for deployment, replicas in known:
        listener(deployment, replicas)
