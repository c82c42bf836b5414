"""The environment of Ray clusters that tests start."""

from __future__ import annotations

from gateway.cli import serve

# Without it Serve kills a proxy that is not ready after 5 s, again and again: beside other tests, at Ray's nice 15, it never is.
RAY_ENVIRONMENT = {
    **serve.RAY_ENVIRONMENT,
    "RAY_COLOR_PREFIX": "0",
    "RAY_worker_register_timeout_seconds": "180",
}
