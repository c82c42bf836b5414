"""Serve a model: start Ray on this host, one replica a stage, both doors; print `ready …`; run until a signal."""

from __future__ import annotations

import argparse
import http
import http.client
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from types import FrameType
from typing import Any

from gateway.access import Audit, Doorkeeper
from gateway.batch.opening import check_state
from gateway.cli.options import add_config_arguments, config_from
from gateway.cli.ports import free_port
from gateway.cli.progress import Loads, Progress
from gateway.cli.servers import new_stage_token, register
from gateway.config import Config
from gateway.model import load_model
from gateway.planner.split import resolve_layers
from stageline.errors import CheckpointError, ConfigError, InternalError, UnavailableError
from stages.checkpoint import open_checkpoint
from stages.logs import log_to_stderr
from stages.server.access import StageAccess

RAY_ENVIRONMENT = {
    # A local cluster has no strangers to keep out, and a token file in the home directory would outlive it.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray nices its workers to 15: every other process here would go before the stages.
    "RAY_worker_niceness": "0",
    # Serve's own chatter stays in its log files; what stages and gateway say comes through.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # On a busy machine the HTTP proxy needs longer than Serve's 5 s to start, and Serve gives up with a traceback.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Of the local cluster, where nothing else is set."""

_APPLICATION = "stageline"

logger = logging.getLogger("stageline.serve")


class _Stop(BaseException):
    """SIGINT or SIGTERM. Not an Exception: nothing in between may swallow it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline serve`."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve in the foreground. Returns 0 after SIGINT or SIGTERM."""
    config = _complete(config_from(args))
    stdout = _keep_stdout()
    json_lines = config.server.log_format == "json"
    if json_lines:
        log_to_stderr("json")
    say = logger.info if json_lines else _print
    _handle_signals(_on_signal)
    record = token = None
    try:
        if not config.security.stage_certificate_file and not config.security.stage_token_file:
            token = new_stage_token()  # the stages of this host are for this server alone
            security = config.security.model_copy(update={"stage_token_file": str(token)})
            config = config.model_copy(update={"security": security})
        say("starting Ray")
        _start_ray(config)
        with Progress(_loads, say=logger.info if json_lines else None) as progress:
            _deploy(config)
            progress.wait_for("a pipeline")
            _wait_ready(config)
        host, secure = config.server.host, "s" if config.security.certificate_file else ""
        record = register(f"{host}:{config.server.grpc_port}")
        print(
            f"ready http{secure}://{host}:{config.server.http_port} grpc{secure}://{host}:{config.server.grpc_port}",
            file=stdout,
            flush=True,
        )
        while True:
            signal.pause()
    except _Stop:
        say("stopping")
        return 0
    finally:
        _handle_signals(signal.SIG_IGN)
        if record is not None:
            record.unlink(missing_ok=True)
        try:
            _shut_down()
        finally:  # not before: the stages read it again and again
            if token is not None:
                token.unlink(missing_ok=True)


def _print(line: str) -> None:
    print(f"stageline: {line}", file=sys.stderr, flush=True)


def _carry(line: str, replica: str) -> None:
    """Of a replica: what is an object already as it is, anything else (Ray's own lines, a crash) in one."""
    if line.startswith('{"time": ') and line.endswith("}"):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    else:
        logger.info("%s", line, extra={"replica": replica})


def _handle_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise _Stop


def _keep_stdout() -> Any:
    """Keep the real stdout for the ready line; everything else that prints there (Ray does) goes to stderr."""
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stdout


def _complete(config: Config) -> Config:
    """Check what can be checked before anything starts, and choose ports that were left to us (0).

    Raises the typed error of whatever is wrong: model, tokenizer, split, tensors of a stage, batch state, ports.
    """
    if not config.model.path:
        raise ConfigError(
            "MODEL_MISSING", "--model is required: a folder, a .gguf file, or a hub id", field="model.path"
        )
    checkpoint = open_checkpoint(config.model.path, revision=config.model.revision)
    ranges = resolve_layers(checkpoint.config, config.stages.count, config.stages.layers)
    for index, layers in enumerate(ranges):
        try:
            checkpoint.verify_index(layers)
        except CheckpointError as error:
            raise CheckpointError(
                error.reason,
                f"stage {index} (layers {layers}) cannot load: {error.message}",
                **{**error.metadata, "stage": index},
            ) from None
    load_model(config)
    config.security.door_tls()
    Doorkeeper(config.security.keys_file, Audit(config.security.audit_file))
    StageAccess(**config.security.stage_files())
    check_state(config.batch)
    server = config.server
    _check_listening(server.host, server.grpc_port, "server.grpc_port")
    _check_listening(server.host, server.http_port, "server.http_port")
    grpc_port = server.grpc_port or free_port(server.host, avoid=[server.http_port])
    http_port = server.http_port or free_port(server.host, avoid=[grpc_port])
    if grpc_port == http_port:
        raise ConfigError(
            "PORT_IN_USE", f"gRPC and HTTP cannot both listen on port {grpc_port}", field="server.http_port"
        )
    model = config.model.absolute()
    name = config.model.name or os.path.basename(model.path.rstrip("/"))
    return config.model_copy(
        update={
            "model": model.model_copy(update={"name": name}),
            "server": server.model_copy(update={"grpc_port": grpc_port, "http_port": http_port}),
            "stages": config.stages.model_copy(update={"host": config.stages.host or "127.0.0.1"}),
            "security": config.security.absolute(),
        }
    )


def _check_listening(host: str, port: int, field: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                "PORT_IN_USE",
                f"{field}: cannot listen on {host}:{port}: {error.strerror}; "
                "stop what listens there or choose another port",
                field=field,
                port=port,
            ) from None


def _start_ray(config: Config) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, configure_logging=True)
    _handle_signals(_on_signal)  # ray.init installs its own
    if config.server.log_format == "json":
        from gateway.serve_adapter import carry_lines

        carry_lines(_carry)
    http_options: dict[str, Any] = {"host": config.server.host, "port": config.server.http_port}
    if config.security.certificate_file:
        http_options["ssl_certfile"], http_options["ssl_keyfile"] = (
            config.security.certificate_file,
            config.security.key_file,
        )
    serve.start(http_options=http_options)


def _deploy(config: Config) -> None:
    """Deploy the application; raises the stage's own error where one cannot start."""
    from ray import serve

    from gateway.app import application, autoscaling_policy
    from gateway.serve_adapter import run_with_policy

    try:
        if config.pipelines.max is None:
            serve.run(application(config), name=_APPLICATION, route_prefix="/")
        else:
            args = config.model_dump(exclude={"server": {"http_port"}})  # Serve's own door, opened already
            run_with_policy(_APPLICATION, "gateway.app:build", args, autoscaling_policy(config))
    except RuntimeError as error:
        problem = _first_problem()
        if problem:
            raise CheckpointError("STAGE_CANNOT_START", problem) from None
        raise InternalError("DEPLOY_FAILED", f"Ray Serve could not deploy: {error}") from None


def _loads() -> Loads:
    from gateway.serve_adapter import start_reports

    return {r["name"]: (r["done"], r["total"]) for r in start_reports(_APPLICATION) if "done" in r}


def _first_problem() -> str:
    """What the first stage that could not start says: one line, and the traceback of what we did not foresee."""
    from gateway.serve_adapter import start_reports

    for report in start_reports(_APPLICATION):
        if "problem" in report:
            return "\n".join(filter(None, [report["traceback"], report["problem"]]))
    return ""


def _wait_ready(config: Config) -> None:
    """Return when a canary has gone through every stage. Raises UnavailableError after `ready_timeout_s`."""
    deadline = time.monotonic() + config.server.ready_timeout_s
    while time.monotonic() < deadline:
        if _is_ready(config):
            return
        time.sleep(0.2)
    raise UnavailableError(
        "NOT_READY", f"no pipeline was ready within {config.server.ready_timeout_s} s; see the log above"
    )


def _is_ready(config: Config) -> bool:
    """What /readyz says; the gRPC door is open before it says anything."""
    host, port = config.server.host, config.server.http_port
    connection: http.client.HTTPConnection = http.client.HTTPConnection(host, port, timeout=5)
    if config.security.certificate_file:  # our own process, by its address: the certificate has the name clients know
        connection = http.client.HTTPSConnection(host, port, timeout=5, context=ssl._create_unverified_context())
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False  # the door opens when the gateway replica is up
    finally:
        connection.close()


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        # Serve waits for its replicas without a limit of its own; 60 s is what a supervisor allows.
        worker = threading.Thread(target=serve.shutdown, daemon=True)
        worker.start()
        worker.join(timeout=45)
        ray.shutdown()
