"""A Ray cluster of several nodes on this host with Stageline deployed on it as `serve deploy` does, and its processes by pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.ports import free_ports
from tests.ray_environment import RAY_ENVIRONMENT

APPLICATION = "stageline"
NODE_ATTEMPTS = 4
START_TIMEOUT_S = 600.0


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Raises TimeoutError."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"waited {timeout_s} s in vain for {what}")
        time.sleep(0.2)


def alive(pid: int) -> bool:
    """Whether it runs or could go on running; what is only waited for by its parent does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline, as the gateway sees it. `phase`: state of that pipeline."""

    layers: str
    phase: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a scenario runs on. `workers`: nodes beside the head that hold the stages, `stages_a_node` each (0: the head has
    them all). `redis`: Ray's state lives in a Redis of ours. `disk_mib`: all that Ray writes goes to a disk of that size.
    `settings`: fields of the configuration; "{temp_dir}" in one is the folder that Ray writes to."""

    replicas: int = 2
    workers: int = 0
    stages_a_node: int = 4
    redis: bool = False
    disk_mib: int = 0
    import_path: str = "gateway.app:build"
    settings: Mapping[str, Any] = field(default_factory=dict)


class RayServe:
    """The running application; made by `ray_serve`."""

    def __init__(self, cluster: Any, shape: Shape, args: dict[str, Any], temp_dir: Path) -> None:
        self.cluster, self.shape, self.temp_dir = cluster, shape, temp_dir
        self.args = args
        self.address = f"127.0.0.1:{args['server']['grpc_port']}"
        self.stub = InferenceServiceStub(grpc.insecure_channel(self.address))
        self._changes: dict[str, dict[str, Any]] = {}
        self._actor_options = {"num_cpus": 2.0 if shape.workers else 0.1}  # 2: not on the head

    def deploy(self, **stage_changes: Any) -> None:
        """Declare the application, as `serve deploy` does with a file; `stage_changes` hold for every stage from now on.
        Returns at once."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self._changes = {**self._changes, **stage_changes}
        stages = [
            {"name": f"stage-{index}", "ray_actor_options": self._actor_options, **self._changes}
            for index in range(self.args["stages"]["count"])
        ]
        gateway = {"name": "gateway", "ray_actor_options": {"num_cpus": 0.1, "resources": {"head": 0.01}}}
        declared = {
            "name": APPLICATION, "route_prefix": "/", "import_path": self.shape.import_path, "args": self.args,
            "deployments": [*stages, gateway],
        }  # fmt: skip
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [declared]}))

    def roll_stages(self, round_number: int) -> None:
        """What makes Serve replace every replica of every stage: other options of their processes."""
        self.deploy(ray_actor_options={**self._actor_options, "num_cpus": self._actor_options["num_cpus"] * (1 + round_number / 100)})  # fmt: skip

    def pipelines(self) -> list[pb.PipelineStatus]:
        """Raises grpc.RpcError while the gateway is down."""
        return list(self.stub.GetModel(pb.GetModelRequest(), timeout=60).pipelines)

    def stages(self) -> list[Stage]:
        """All that run in a pipeline."""
        found = [
            Stage(stage.layers, pipeline.state, replica.pid)
            for pipeline in self.pipelines()
            for stage in pipeline.stages
            for replica in stage.replicas
        ]
        return [stage for stage in found if alive(stage.pid)]

    def whole(self, without: set[int] = frozenset(), pipelines: int | None = None) -> bool:
        """Whether all pipelines are ready, of processes that run, and none of `without` is among them."""
        wanted = self.shape.replicas if pipelines is None else pipelines
        try:
            found = self.pipelines()
        except grpc.RpcError:
            return False
        pids = {replica.pid for one in found for stage in one.stages for replica in stage.replicas}
        ready = [one.state for one in found] == ["ready"] * wanted
        return ready and all(alive(pid) for pid in pids) and not pids & without

    def processes(self, title: str) -> list[int]:
        """Pids of this cluster's processes that Ray named so, of all nodes."""
        raylets = {info.process.pid for node in self.cluster.list_all_nodes() for info in node.all_processes.get("raylet", [])}  # fmt: skip
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in raylets and title in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
        return [pid for pid in found if alive(pid)]

    def add_worker(self) -> Any:
        """A node for stages."""
        return _started(lambda: self.cluster.add_node(num_cpus=2 * self.shape.stages_a_node + 1))

    def node_of(self, pid: int) -> Any:
        """The node whose raylet started the process."""
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return next(
            node for node in self.cluster.list_all_nodes()
            for info in node.all_processes.get("raylet", []) if info.process.pid == parent
        )  # fmt: skip


@contextlib.contextmanager
def ray_serve(model: str, shape: Shape, *, num_stages: int = 2, dtype: str = "float32") -> Iterator[RayServe]:
    """All of it, until the block ends: nothing of it is left then."""
    grpc_port, http_port = free_ports(2)
    args: dict[str, Any] = {
        "model": {"path": model, "dtype": dtype, "batch_invariant": True},
        "stages": {"count": num_stages, "replicas": shape.replicas, "num_threads": 1, "host": "127.0.0.1"},
        "kv_cache": {"num_blocks": 512},
        "server": {"grpc_port": grpc_port},
    }
    with contextlib.ExitStack() as stack:
        # Not the tests' folders: Ray's sockets lie in it, and a socket's path has 107 bytes at most.
        temp_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)))
        for name, value in shape.settings.items():
            section, _, key = name.partition(".")
            args.setdefault(section, {})[key] = value.format(temp_dir=temp_dir) if isinstance(value, str) else value
        if shape.disk_mib:
            stack.enter_context(_small_disk(temp_dir, shape.disk_mib))
        environment = {**RAY_ENVIRONMENT, "RAY_TMPDIR": str(temp_dir)}
        if shape.redis:
            environment["RAY_REDIS_ADDRESS"] = stack.enter_context(_redis(temp_dir))
        old = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        stack.callback(lambda: [os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v) for k, v in old.items()])  # fmt: skip

        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        head = 1 if shape.workers else 2 * shape.stages_a_node
        options = {"num_cpus": head, "resources": {"head": 1}, "include_dashboard": False}
        cluster = _started(lambda: Cluster(initialize_head=True, head_node_args=options))
        stack.callback(cluster.shutdown)
        running = RayServe(cluster, shape, args, temp_dir)
        for _ in range(shape.workers):
            running.add_worker()
        ray.init(address=cluster.address, log_to_driver=bool(os.environ.get("CHAOS_LOG")), logging_level="WARNING")
        stack.callback(ray.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        stack.callback(serve.shutdown)
        running.deploy()
        until(running.whole, "the application", START_TIMEOUT_S)
        yield running


def _started(start: Callable[[], Any]) -> Any:
    """What `start` starts. On a busy machine a raylet gives itself up when its agents are not there within 15 s: again, then."""
    for _ in range(NODE_ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:  # Ray has no type for it
            if "timed out during startup" not in str(error):
                raise
    return start()


@contextlib.contextmanager
def _small_disk(folder: Path, mib: int) -> Iterator[None]:
    """A disk in memory, mounted at `folder`. Raises PermissionError where this user cannot mount."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "chaos", str(folder)], capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise PermissionError(f"cannot mount a small disk (it takes root): {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[str]:
    """A Redis of our own on loopback; yields its address. Raises FileNotFoundError where it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError("redis-server is not installed (Debian: apt-get install redis-server)")
    [port] = free_ports(1)
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
