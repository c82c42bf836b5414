"""Stages and gateways in processes of their own, to be stopped, killed and watched.

`python process_nursery.py` forks one process for every JSON line on stdin and prints a JSON line once it serves: forked,
not started anew, because what takes seconds is importing. `nursery()` is the other end.

    {"kind": "stage", "layers": [0, 2], "num_blocks": 64, "delay_s": 0.002}        a toy stage → {"pid", "address"}
    {"kind": "stage", "layers": null, "num_blocks": 64}                            a spare that takes any → {"pid", "address"}
    {"kind": "gateway", "stages": [ADDRESS, ...], "settings": {EngineSettings}, "max_context_tokens": 200, "model": FOLDER}
                                            both doors → {"pid", "grpc", "http"}; without "model" the toy's
    {"kind": "toy_gateway", "port": 0, "fingerprint": "toy", "state_url": "sqlite:///FILE", "http_port": 0}
                                            the gRPC door, with "http_port" the HTTP door too, over toy stages within it →
                                            {"pid", "port", "http_port"}
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Nursery:
    """Starts processes; kills those that are left at the end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._pids: list[int] = []

    def start(self, **what: Any) -> dict[str, Any]:
        """Returns what the process says once it serves. Raises EOFError where it does not come up."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("the nursery ended")
        answer = json.loads(line)
        self._pids.append(answer["pid"])
        return answer

    def stage(self, start: int, end: int, **options: Any) -> dict[str, Any]:
        """A toy stage."""
        return self.start(kind="stage", layers=[start, end], **options)

    def spare(self, **options: Any) -> dict[str, Any]:
        """A toy that takes any stage."""
        return self.start(kind="stage", layers=None, **options)

    def gateway(self, stages: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """A gateway over stages, which need not be toys."""
        return self.start(kind="gateway", stages=[stage["address"] for stage in stages], **options)

    @contextmanager
    def toy_gateway(self, **options: Any) -> Iterator[ToyGateway]:
        """A gateway with toy stages within it, until the block ends."""
        gateway = ToyGateway(self, options)
        try:
            yield gateway
        finally:
            gateway.kill()

    def signal(self, process: dict[str, Any], number: int) -> None:
        """Send a signal to one of them."""
        assert process["pid"] in self._pids
        os.kill(process["pid"], number)

    def kill(self, process: dict[str, Any]) -> None:
        """Returns once it is gone, so that its port is free."""
        self.signal(process, signal.SIGKILL)
        while Path(f"/proc/{process['pid']}").exists():
            time.sleep(0.001)
        self._pids.remove(process["pid"])

    def kill_all(self) -> None:
        """SIGKILL reaches stopped processes too."""
        for pid in self._pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        self._pids.clear()


class ToyGateway:
    """A gateway process; `start` after `kill` brings another up on the same port, with the same options."""

    def __init__(self, nursery: Nursery, options: dict[str, Any]) -> None:
        self._nursery, self._options = nursery, {"port": 0, **options}
        self.process: dict[str, Any] | None = None
        self.start()

    @property
    def address(self) -> str:
        """Of its gRPC door, also while it is down."""
        return f"127.0.0.1:{self._options['port']}"

    @property
    def http(self) -> str:
        """URL of its HTTP door, where it was started with one."""
        return f"http://127.0.0.1:{self._options['http_port']}"

    def start(self) -> None:
        """Returns once it serves."""
        self.process = self._nursery.start(kind="toy_gateway", **self._options)
        self._options |= {key: self.process[key] for key in ("port", "http_port") if self.process[key] is not None}

    def signal(self, number: int) -> None:
        """Send a signal to it."""
        assert self.process is not None
        self._nursery.signal(self.process, number)

    def kill(self) -> None:
        """Returns once it is gone; nothing to do where it is."""
        if self.process is not None:
            self._nursery.kill(self.process)
            self.process = None


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery, until the block ends."""
    path = os.pathsep.join([str(HERE), *sys.path])
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with process:
        children = Nursery(process)
        try:
            yield children
        finally:
            children.kill_all()
            assert process.stdin is not None
            process.stdin.close()


async def stage(
    layers: Sequence[int] | None,
    num_blocks: int,
    delay_s: float = 0.0,
    port: int = 0,
    drain_s: float = 5.0,
    fingerprint: str | None = None,
) -> None:
    """A toy stage, or without layers a spare that takes any, until killed; after SIGTERM it drains and ends."""
    from engine_helpers import FINGERPRINT, ToyRunner
    from stage_server_helpers import ToyLoader

    from stages.executor import StageExecutor
    from stages.partition import LayerRange
    from stages.server.server import StageServer

    runner = None if layers is None else ToyRunner(LayerRange(*layers), delay_s=delay_s)
    server = StageServer(
        None if runner is None else StageExecutor(runner),
        fingerprint=fingerprint or FINGERPRINT,
        kv_capacity_blocks=num_blocks,
        queue_depth_steps=8,
        loader=None if runner is not None else ToyLoader(partial(ToyRunner, delay_s=delay_s), capacity=num_blocks),
    )
    port = await server.start("127.0.0.1", port)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    _say(address=f"127.0.0.1:{port}")
    await stop.wait()
    await server.drain(drain_s)
    await server.drained()
    await server.stop()


async def gateway(
    stages: Sequence[str],
    settings: dict[str, Any],
    max_context_tokens: int = 200,
    model: str | None = None,
    write_timeout_s: float = 60.0,
    send_buffer_bytes: int = 0,
    fingerprint: str | None = None,
    drain_s: float = 5.0,
    wait_ready: bool = True,
    grpc_port: int = 0,
) -> None:
    """Both doors over an engine, until killed; after SIGTERM it drains and ends."""
    from engine_helpers import FINGERPRINT, VOCAB_SIZE, byte_tokenizer

    from gateway.api.grpc.server import serve_grpc
    from gateway.api.service import Frontend
    from gateway.engine import Engine, EngineSettings
    from gateway.pipelines.discovery import Registry, StaticDiscovery
    from gateway.tokenizer import load_tokenizer
    from gateway.types import ModelInfo
    from stages.checkpoint import open_checkpoint

    fingerprint, vocab_size, tokenizer = fingerprint or FINGERPRINT, VOCAB_SIZE, None
    if model is not None:
        checkpoint = open_checkpoint(model)
        fingerprint, vocab_size = checkpoint.fingerprint, checkpoint.config.vocab_size
        tokenizer = load_tokenizer(checkpoint.path)
    tokenizer = tokenizer or byte_tokenizer()
    info = ModelInfo(name="toy", fingerprint=fingerprint, max_context_tokens=max_context_tokens, vocab_size=vocab_size)
    registry = Registry()
    engine = Engine(
        model=info, tokenizer=tokenizer, registry=registry, settings=EngineSettings(**settings), fingerprint=fingerprint
    )
    await engine.start()
    discovery = StaticDiscovery(stages, registry)
    await discovery.start()
    if wait_ready:
        await asyncio.wait_for(engine.wait_ready(), 60)
    frontend = Frontend(engine, tokenizer, None, info)
    grpc_server = await serve_grpc(frontend, "127.0.0.1", grpc_port, write_timeout_s=write_timeout_s)
    http_port, serving = await _serve_http(frontend, 0, send_buffer_bytes, write_timeout_s=write_timeout_s)
    _say(grpc=f"127.0.0.1:{grpc_server.port}", http=f"http://127.0.0.1:{http_port}")
    stop = asyncio.Event()
    # uvicorn takes SIGTERM for itself while it serves
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await asyncio.gather(engine.stop(drain_s), grpc_server.stop(drain_s + 1))
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def _serve_http(
    frontend: Any, port: int, send_buffer_bytes: int = 0, **options: Any
) -> tuple[int, asyncio.Task[None]]:
    """The HTTP door: its port, and the task that serves it."""
    import uvicorn

    from gateway.api.http.app import create_http_app

    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    if send_buffer_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    app = create_http_app(lambda: frontend, **options)
    http = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    while not http.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return int(listener.getsockname()[1]), serving


async def toy_gateway(
    port: int, fingerprint: str = "toy", state_url: str | None = None, http_port: int | None = None
) -> None:
    """The gRPC door over an engine and toy stages in one process, until killed; with batches where there is a state, and
    the HTTP door where there is a port for it."""
    import engine_helpers

    from gateway.api.grpc.server import serve_grpc
    from gateway.api.service import Frontend
    from gateway.batch.opening import open_batches
    from gateway.config import BatchSection

    engine_helpers.FINGERPRINT = fingerprint
    cluster = engine_helpers.Cluster()
    for start, end in ((0, 2), (2, engine_helpers.NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=0.004, num_blocks=512)
    engine = await cluster.start(check_integrity=False)
    await engine_helpers.until(engine.ready)
    frontend = Frontend(engine, engine_helpers.byte_tokenizer(), None, engine.model)
    batches = await open_batches(frontend, BatchSection(state_url=state_url))
    server = await serve_grpc(frontend, "127.0.0.1", port, batches=batches)
    serving = None
    if http_port is not None:
        http_port, serving = await _serve_http(frontend, http_port)
    _say(port=server.port, http_port=http_port)
    await asyncio.Event().wait()
    del serving  # until here


def _say(**answer: Any) -> None:
    print(json.dumps({"pid": os.getpid(), **answer}), flush=True)


KINDS = {"stage": stage, "gateway": gateway, "toy_gateway": toy_gateway}


def main() -> None:
    """Fork for every line until stdin ends."""
    import engine_helpers  # noqa: F401  (torch and grpc, once for all)
    import uvicorn  # noqa: F401

    from gateway.batch import opening  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    for line in sys.stdin:
        what = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            asyncio.run(KINDS[what.pop("kind")](**what))
            os._exit(0)  # not on to the next line


if __name__ == "__main__":
    main()
