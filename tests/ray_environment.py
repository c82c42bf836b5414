"""The environment of Ray clusters that tests start."""

from __future__ import annotations

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_COLOR_PREFIX": "0",
    # Beside other tests, workers at Ray's nice 15 do not start within what Ray and Serve allow themselves: Serve kills a proxy that is
    # not ready after 5 s, again and again.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_register_timeout_seconds": "180",
}
