"""Kill stages at random under load and compare every token with an undisturbed run: `make chaos KILLS=200 SEED=1`.

Real Ray Serve, real SIGKILL, batch-invariant mode, so equality is bitwise. One JSON line a kill, then a summary; exit
code 1 where a token differs or a client saw an error.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.chaos.load import ON_ITS_WAY_S, Load, make_requests

NEXT_TOKEN_TIMEOUT_S = 180.0


@contextmanager
def serving(model: str, *flags: str) -> Iterator[str]:
    """`stageline serve` in batch-invariant mode; yields the address of its gRPC door."""
    command = [sys.executable, "-m", "gateway.cli", "serve", "--model", model, "--model.batch-invariant", "true",
               "--grpc-port", "0", "--http-port", "0", *flags]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        if len(ready) != 3:
            raise SystemExit(server.wait() or 1)
        yield ready[2].removeprefix("grpc://")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=120)


@dataclass
class Killer:
    """Kills a random stage at a random moment, `count` times; now and then two at once, or during the recovery."""

    load: Load
    rng: random.Random
    count: int
    settle_s: float
    pauses_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Returns when every kill was survived, or nothing comes any more."""
        while len(self.pauses_s) < self.count:
            time.sleep(self.rng.uniform(0, self.settle_s))
            victims = self.stages()
            if not victims:
                time.sleep(0.2)
                continue
            chosen = self.rng.sample(victims, 2 if len(victims) > 1 and self.rng.random() < 0.1 else 1)
            killed_s, recomputed = time.monotonic(), self.load.live_tokens()
            for _, _, pid in chosen:
                os.kill(pid, signal.SIGKILL)
            if self.rng.random() < 0.15:  # once more while it recovers
                time.sleep(self.rng.uniform(0, 3))
                again = [stage for stage in self.stages() if stage[2] not in {pid for _, _, pid in chosen}]
                if again:
                    chosen.append(self.rng.choice(again))
                    os.kill(chosen[-1][2], signal.SIGKILL)
                    killed_s = time.monotonic()
            pause_s = self.until_next_token(killed_s)
            self.pauses_s.append(pause_s)
            for layers, phase, pid in chosen:
                print(json.dumps({"time": round(time.time(), 2), "pid": pid, "stage": layers, "phase": phase,
                                  "pause_s": round(pause_s, 2), "tokens_recomputed": recomputed,
                                  "tokens_compared": self.load.num_tokens}), flush=True)  # fmt: skip

    def stages(self) -> list[tuple[str, str, int]]:
        """Layers, state of the pipeline and pid of every stage in a pipeline, if the process still runs."""
        model = self.load.stub.GetModel(pb.GetModelRequest(), timeout=60)
        found = [
            (stage.layers, pipeline.state, replica.pid)
            for pipeline in model.pipelines
            for stage in pipeline.stages
            for replica in stage.replicas
        ]
        return [stage for stage in found if os.path.exists(f"/proc/{stage[2]}")]

    def until_next_token(self, killed_s: float) -> float:
        """Seconds from the kill to a token that was computed after it."""
        time.sleep(ON_ITS_WAY_S)
        after_s = time.monotonic()
        while self.load.last_token_s < after_s:
            if time.monotonic() > killed_s + NEXT_TOKEN_TIMEOUT_S:
                raise TimeoutError(f"no token within {NEXT_TOKEN_TIMEOUT_S} s after a kill")
            time.sleep(0.01)
        return self.load.last_token_s - killed_s


def run(address: str, *, seed: int, kills: int, streams: int, requests: int, num_tokens: int, settle_s: float) -> dict:
    """Load, kills, comparison. The summary has `faults`, which must be empty."""
    rng = random.Random(seed)
    vocab_size = InferenceServiceStub(grpc.insecure_channel(address)).GetModel(pb.GetModelRequest()).vocab_size
    load = Load([address], make_requests(rng, requests, num_tokens, vocab_size))
    load.learn(streams)
    undisturbed, load.num_tokens = load.num_tokens, 0
    over, outcome = threading.Event(), queue.Queue[BaseException | None]()
    killer = Killer(load, rng, kills, settle_s)

    def kill() -> None:
        error = None
        try:
            killer.run()
        except BaseException as caught:
            error = caught
        over.set()
        outcome.put(error)

    threading.Thread(target=kill).start()
    load.disturb(streams, over)
    error = outcome.get()
    if error is not None:
        load.faults.append(f"{type(error).__name__}: {error}")
    pauses = sorted(killer.pauses_s) or [0.0]
    return {
        "seed": seed, "kills": len(killer.pauses_s), "streams": streams, "tokens_undisturbed": undisturbed,
        "tokens_compared": load.num_tokens, "pause_s": {"median": round(statistics.median(pauses), 2), "max": round(pauses[-1], 2)},
        "faults": load.faults,
    }  # fmt: skip


def main() -> int:
    """Exit code 0 where every stream was exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the demo's SmolLM2-135M")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--spares", type=int, default=0, help="replicas that take any stage")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="different requests")
    parser.add_argument("--num-tokens", type=int, default=100, help="tokens of each answer")
    parser.add_argument("--settle-s", type=float, default=6.0, help="longest wait between recovery and the next kill")
    args = vars(parser.parse_args())
    model, flags = args.pop("model"), [f"--stages={args.pop('stages')}"]
    flags += [f"--stages.{name}={args.pop(name)}" for name in ("replicas", "spares")]
    if model is None:
        from gateway.demo import fetch_model

        model = str(fetch_model())
    with serving(model, *flags) as address:
        summary = run(address, **args)
    print(json.dumps(summary))
    return 1 if summary["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
