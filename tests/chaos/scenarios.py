"""Losses and changes under load, each compared token by token with an undisturbed run: `make chaos SCENARIO="rolling drain"`.

Real Ray Serve on real Ray processes, batch-invariant mode, so equality is bitwise. One JSON line an event: time, event, pid,
stage, phase (the state of its pipeline), pause_s (the longest that a stream waited for its next token) and live_tokens (of
all running streams; those that lost their pipeline are computed again). Exit code 1 where a token differs or a client saw an
error. Clients never retry, but where the gateway itself is lost (gateway, gateways).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.inference.v1 import inference_service_pb2 as pb
from tests.chaos.gateways import two_gateways
from tests.chaos.load import REQUEST_TIMEOUT_S, Load, make_requests
from tests.chaos.ray_processes import RayServe, Shape, Stage, alive, ray_serve, until

MOVED_ON_TIMEOUT_S = 180.0
STOPPED_S = 10.0
PROXIED = "tests.chaos.proxied_stages:build"


@dataclass
class Run:
    """One scenario under way."""

    name: str
    serve: RayServe
    load: Load
    rng: random.Random
    rounds: int
    streams: int

    def harm(self, event: str, victims: list[Stage], act: Callable[[], Any]) -> None:
        """Do it, and return when every stream has gone on since."""
        began_s = self.begin()
        act()
        self.load.moved_on(time.monotonic(), self.streams, MOVED_ON_TIMEOUT_S)
        for victim in victims:
            self.say(event, victim, began_s)

    def begin(self) -> float:
        """Measure pauses from here on; returns the time for `say`."""
        self._live_tokens = self.load.live_tokens()
        self.load.mark()
        return time.time()

    def say(self, event: str, victim: Stage, began_s: float) -> None:
        """One line."""
        line = {"scenario": self.name, "time": round(began_s, 2), "event": event, "pid": victim.pid, "stage": victim.layers,
                "phase": victim.phase, "pause_s": round(self.load.longest_pause_s, 2), "live_tokens": self._live_tokens}  # fmt: skip
        print(json.dumps(line), flush=True)

    def whole(self, without: set[int] = frozenset(), pipelines: int | None = None) -> None:
        """Return when all pipelines stand again."""
        until(lambda: self.serve.whole(without, pipelines), "whole pipelines", MOVED_ON_TIMEOUT_S)

    def other(self, what: str, title: str) -> Stage:
        """A process that is no stage."""
        [pid] = self.serve.processes(title)
        return Stage(what, "", pid)


def kill(victims: list[Stage]) -> None:
    """SIGKILL, all at once."""
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)


def controller(run: Run) -> None:
    """Serve's controller and a stage are killed together."""
    for _ in range(run.rounds):
        victims = [run.other("controller", "ServeController"), run.rng.choice(run.serve.stages())]
        run.harm("killed together", victims, lambda victims=victims: kill(victims))
        run.whole({victim.pid for victim in victims})
        until(lambda: len(run.serve.processes("ServeController")) == 1, "the controller")


def every_stage(run: Run) -> None:
    """All stages are killed, each as soon as all streams have gone on after the one before."""
    for _ in range(run.rounds):
        victims = run.serve.stages()
        run.rng.shuffle(victims)
        for victim in victims:
            if alive(victim.pid):
                run.harm("killed", [victim], lambda victim=victim: kill([victim]))
        run.whole({victim.pid for victim in victims})


def stopped(run: Run) -> None:
    """A stage stands still (SIGSTOP) for 10 s, which is past its lease, then it goes on and is taken again."""
    for _ in range(run.rounds):
        victim = run.rng.choice(run.serve.stages())
        began_s = run.begin()
        os.kill(victim.pid, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        os.kill(victim.pid, signal.SIGCONT)
        run.load.moved_on(time.monotonic(), run.streams, MOVED_ON_TIMEOUT_S)
        run.say(f"stopped for {STOPPED_S} s", victim, began_s)
        run.whole()


def delay(run: Run) -> None:
    """50 ± 50 ms before every stage: slow, and nothing else."""
    epochs = [pipeline.epoch for pipeline in run.serve.pipelines()]
    for _ in range(run.rounds):
        wanted = run.load.num_ended + 2 * run.streams
        run.harm("50 ± 50 ms", run.serve.stages(), lambda wanted=wanted: until(lambda: run.load.num_ended >= wanted, "streams to end", 300.0))  # fmt: skip
    if epochs != [pipeline.epoch for pipeline in run.serve.pipelines()]:
        run.load.faults.append("a slow network was taken for a broken one")


def gateway(run: Run) -> None:
    """Serve's gateway replica is killed; clients resume through the library."""
    for _ in range(run.rounds):
        victim = run.other("gateway", "ServeReplica:stageline:gateway")
        run.harm("killed", [victim], lambda victim=victim: kill([victim]))
        run.whole()


def rolling(run: Run) -> None:
    """Serve's own rolling update of every stage at once."""
    for number in range(1, run.rounds + 1):
        old = run.serve.stages()
        began_s = run.begin()
        run.serve.roll_stages(number)
        _until_replaced(run, old, began_s, "rolled")


def scale_down(run: Run) -> None:
    """Serve takes away all replicas but one of every stage while streams run, and brings them back."""
    for _ in range(run.rounds):
        before = run.serve.stages()
        began_s = run.begin()
        run.serve.deploy(num_replicas=1)
        until(lambda before=before: sum(alive(stage.pid) for stage in before) == len(before) // run.serve.shape.replicas, "replicas to go")  # fmt: skip
        run.whole(pipelines=1)
        run.load.moved_on(time.monotonic(), run.streams, MOVED_ON_TIMEOUT_S)
        for stage in before:
            if not alive(stage.pid):
                run.say("scaled down", stage, began_s)
        run.serve.deploy(num_replicas=run.serve.shape.replicas)
        run.whole()


def drain(run: Run) -> None:
    """A node with stages is drained (`ray drain-node`) and goes; a new one comes."""
    for _ in range(run.rounds):
        run.serve.add_worker()
        node = run.serve.node_of(run.rng.choice(run.serve.stages()).pid)
        old = [stage for stage in run.serve.stages() if run.serve.node_of(stage.pid) is node]
        began_s = run.begin()
        subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", run.serve.cluster.address, "--node-id",
             node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos",
             "--deadline-remaining-seconds", "60"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        _until_replaced(run, old, began_s, "drained")
        run.serve.cluster.remove_node(node)


def raylet(run: Run) -> None:
    """The raylet of a node with stages is killed, and with it all of them; a new node comes."""
    for _ in range(run.rounds):
        node = run.serve.node_of(run.rng.choice(run.serve.stages()).pid)
        victims = [stage for stage in run.serve.stages() if run.serve.node_of(stage.pid) is node]
        run.harm("raylet killed", victims, node.kill_raylet)
        run.serve.cluster.remove_node(node)
        run.serve.add_worker()
        run.whole({victim.pid for victim in victims})


def gcs(run: Run) -> None:
    """Ray's GCS, whose state is in Redis, is killed; streams go on without it; a stage is lost before it is back."""
    for _ in range(run.rounds):
        head = run.serve.cluster.head_node
        victim = Stage("gcs", "", head.all_processes["gcs_server"][0].process.pid)
        run.harm("killed", [victim], head.kill_gcs_server)
        stage = run.rng.choice(run.serve.stages())
        kill([stage])
        began_s = run.begin()
        time.sleep(run.rng.uniform(1, 5))
        head.start_gcs_server()
        run.load.moved_on(time.monotonic(), run.streams, MOVED_ON_TIMEOUT_S)
        run.say("killed while there was no GCS", stage, began_s)
        run.whole({stage.pid})


def full_disk(run: Run) -> None:
    """The disk with all logs, Ray's and ours and the audit log, is full while a stage is killed; it is started again once there is room."""
    for _ in range(run.rounds):
        filler = run.serve.temp_dir / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        free = os.statvfs(run.serve.temp_dir).f_bavail
        if free:
            raise RuntimeError(f"{free} blocks are free")
        victim = run.rng.choice(run.serve.stages())
        run.harm("killed on a full disk", [victim], lambda victim=victim: kill([victim]))
        filler.unlink()  # until then Ray starts no process: each has to write files of its own
        run.whole({victim.pid})


def _until_replaced(run: Run, old: list[Stage], began_s: float, event: str) -> None:
    """One line for each as it goes; return when other processes serve."""
    left = list(old)

    def gone() -> bool:
        for stage in [stage for stage in left if not alive(stage.pid)]:
            left.remove(stage)
            run.say(event, stage, began_s)
        return not left

    until(gone, "the old replicas to go", MOVED_ON_TIMEOUT_S)
    run.whole({stage.pid for stage in old})
    run.load.moved_on(time.monotonic(), run.streams, MOVED_ON_TIMEOUT_S)


TWO_PIPELINES = Shape(settings={"pipelines.lease_s": 3.0, "stages.drain_timeout_s": 8.0})
NODES = Shape(workers=2, stages_a_node=2, redis=True, settings=TWO_PIPELINES.settings)
SCENARIOS: dict[str, tuple[Callable[[Run], None], Shape]] = {
    "controller": (controller, TWO_PIPELINES),
    "every-stage": (every_stage, TWO_PIPELINES),
    "stopped": (stopped, TWO_PIPELINES),
    "rolling": (rolling, TWO_PIPELINES),
    "scale-down": (scale_down, TWO_PIPELINES),
    "gateway": (gateway, TWO_PIPELINES),
    "delay": (delay, Shape(replicas=1, import_path=PROXIED, settings={"stages.shared_memory_bytes": 0})),
    "drain": (drain, NODES),
    "raylet": (raylet, NODES),
    "gcs": (gcs, NODES),
    "full-disk": (
        full_disk,
        Shape(disk_mib=64, settings={**TWO_PIPELINES.settings, "security.audit_file": "{temp_dir}/audit.log"}),
    ),
}
RESUMING = {"gateway"}  # scenarios whose clients need the library


def run_on_ray(
    names: list[str], *, model: str, seed: int, rounds: int, streams: int, num_tokens: int, shape: Shape
) -> Iterator[dict[str, Any]]:
    """Scenarios of one shape, one after another on one cluster; a summary of each, whose `faults` must be empty."""
    with ray_serve(model, shape) as serve:
        vocab_size = serve.stub.GetModel(pb.GetModelRequest()).vocab_size
        for name in names:
            rng = random.Random(f"{name} {seed}")
            requests = make_requests(rng, streams, num_tokens, vocab_size)
            load = Load([serve.address], requests, resuming=name in RESUMING, timeout_s=REQUEST_TIMEOUT_S)
            load.learn(streams)
            undisturbed, load.num_tokens, began_s = load.num_tokens, 0, time.monotonic()
            try:
                with load.running(streams):
                    SCENARIOS[name][0](Run(name, serve, load, rng, rounds, streams))
            except Exception as error:
                load.faults.append(f"{type(error).__name__}: {error}")
            yield {
                "scenario": name, "seed": seed, "rounds": rounds, "streams": streams, "seconds": round(time.monotonic() - began_s, 1),
                "tokens_undisturbed": undisturbed, "tokens_compared": load.num_tokens, "faults": load.faults,
            }  # fmt: skip


def main() -> int:
    """Exit code 0 where every stream was exact and no client saw an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SCENARIOS, "gateways"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--model", help="a checkpoint (float32); default: the tests' tiny one, random weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="how often each does its harm")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=150, help="of each answer")
    args = vars(parser.parse_args())
    names = args.pop("names") or known
    if unknown := set(names) - set(known):
        parser.error(f"no scenario is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with contextlib.ExitStack() as stack:
        if args["model"] is None:
            from tests.tiny import save_tiny

            args["model"] = str(save_tiny(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny"))
        faults = 0
        while names:
            if names[0] == "gateways":
                done, summaries = names[:1], two_gateways(**args)
            else:
                shape = SCENARIOS[names[0]][1]
                done = [name for name in names if name in SCENARIOS and SCENARIOS[name][1] == shape]
                summaries = run_on_ray(done, shape=shape, **args)
            names = [name for name in names if name not in done]
            for summary in summaries:
                faults += len(summary["faults"])
                print(json.dumps(summary), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
