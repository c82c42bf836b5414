"""The Kubernetes API server of the current kubeconfig, or inside a pod that of its service account."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stageline.errors import ConfigError, UnavailableError


@contextmanager
def api_client(flag: str, context: str | None = None) -> Iterator[Any]:
    """A `kubernetes.client.ApiClient` for the block. `flag` is the one that asked for a cluster; errors begin with it.

    Raises ConfigError without a usable kubeconfig, UnavailableError where the API server does not answer or fails. Other
    answers are the block's, as ApiException.
    """
    import urllib3
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException

    load: Any = config.load_config  # untyped
    # The client reads KUBECONFIG only once, when it is imported.
    kubeconfig = {"config_file": os.environ["KUBECONFIG"]} if os.environ.get("KUBECONFIG") else {}
    # Without any kubeconfig the client passes what it got to a loader that takes nothing.
    wanted = kubeconfig if context is None else {**kubeconfig, "context": context}
    try:
        with contextlib.redirect_stdout(None):  # it prints where it looks
            load(**wanted)
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            "KUBECONFIG_UNUSABLE", f"{flag}: {error}; set KUBECONFIG or run where kubectl works", field=flag.strip("-")
        ) from None
    try:
        with client.ApiClient() as api:
            yield api
    except ApiException as error:
        raise UnavailableError(
            "API_SERVER_FAILED", f"{flag}: the API server answered {error.status} {error.reason}", status=error.status
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise UnavailableError("API_SERVER_UNREACHABLE", f"{flag}: the API server does not answer: {error}") from None
