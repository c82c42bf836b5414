"""Two gateways over two pipelines of stage processes, without Ray, under which there is one gateway only: they are killed,
or stopped past their leases, in turn, and clients go on through the library."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.chaos.cancels import ModelStages
from tests.chaos.load import REQUEST_TIMEOUT_S, Load, make_requests
from tests.chaos.ray_processes import until
from tests.ports import free_ports

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from process_nursery import Nursery, nursery

LEASE_S = 1.0
TIMEOUT_S = 120.0


class Gateways:
    """Two gateway processes over the same stages; each owns one pipeline, and both when it is alone."""

    def __init__(self, children: Nursery, stages: list[dict[str, Any]], model: str) -> None:
        self._children, self._stages, self._model = children, stages, model
        # The first leaves a pipeline to the second, if that comes soon; where it does not, the second waits for a loss.
        self.ports = free_ports(2)
        self.running = [self._start(port, patience_s=patience_s) for port, patience_s in zip(self.ports, (10.0, 3.0), strict=True)]  # fmt: skip

    def _start(self, port: int, *, patience_s: float = 3.0, wait_ready: bool = True) -> dict[str, Any]:
        settings = {"lease_s": LEASE_S, "canary_interval_s": 1.0, "eager_pipelines": 1, "patience_s": patience_s}
        return self._children.gateway(
            self._stages, settings=settings, model=self._model, max_context_tokens=400, grpc_port=port, wait_ready=wait_ready
        )  # fmt: skip

    @property
    def addresses(self) -> list[str]:
        """Those of both doors, which stay when a gateway is started again."""
        return [f"127.0.0.1:{port}" for port in self.ports]

    def pipelines(self, which: int) -> list[pb.PipelineStatus]:
        """What one of them owns; nothing where it does not answer."""
        with grpc.insecure_channel(self.addresses[which]) as channel, contextlib.suppress(grpc.RpcError):
            return list(InferenceServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=2).pipelines)
        return []

    def owns(self, which: int, count: int) -> bool:
        """Whether it has so many pipelines that are ready."""
        return [one.state for one in self.pipelines(which)] == ["ready"] * count

    def kill(self, which: int) -> None:
        """SIGKILL."""
        self._children.kill(self.running[which])

    def start(self, which: int) -> None:
        """Another in the place of one that was killed; it may have to wait for a pipeline."""
        self.running[which] = self._start(self.ports[which], wait_ready=False)

    def signal(self, which: int, number: int) -> None:
        """SIGSTOP and SIGCONT."""
        self._children.signal(self.running[which], number)


def two_gateways(*, model: str, seed: int, rounds: int, streams: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Each round one of them is lost, in two thirds by SIGKILL, else by SIGSTOP past its leases. Yields the summary."""
    rng = random.Random(f"gateways {seed}")
    config = json.loads((Path(model) / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    with nursery() as children, contextlib.ExitStack() as stack:
        both = [ModelStages(model, num_layers, rng, dtype="float32") for _ in range(2)]
        for one in both:
            stack.callback(one.close)
        gateways = Gateways(children, [stage for one in both for stage in one.running], model)
        load = Load(
            gateways.addresses,
            make_requests(rng, streams, num_tokens, config["vocab_size"]),
            resuming=True,
            timeout_s=REQUEST_TIMEOUT_S,
        )
        load.learn(streams)
        undisturbed, load.num_tokens, began_s = load.num_tokens, 0, time.monotonic()
        try:
            with load.running(streams):
                for _ in range(rounds):
                    _round(gateways, load, rng, streams)
        except Exception as error:
            load.faults.append(f"{type(error).__name__}: {error}")
        yield {
            "scenario": "gateways", "seed": seed, "rounds": rounds, "streams": streams, "seconds": round(time.monotonic() - began_s, 1),
            "tokens_undisturbed": undisturbed, "tokens_compared": load.num_tokens, "faults": load.faults,
        }  # fmt: skip


def _round(gateways: Gateways, load: Load, rng: random.Random, streams: int) -> None:
    # Streams go where the client's list begins, and on from there: lose the one that has them more often than not.
    busy = [sum(one.num_running_sequences for one in gateways.pipelines(which)) for which in range(2)]
    which = busy.index(max(busy)) if rng.random() < 0.8 else rng.randrange(2)
    fatal = rng.random() < 2 / 3
    time.sleep(rng.uniform(0, 1))
    line = {"scenario": "gateways", "time": round(time.time(), 2), "event": "killed" if fatal else "stopped",
            "pid": gateways.running[which]["pid"], "stage": "gateway", "phase": f"{busy[which]} sequences"}  # fmt: skip
    live_tokens = load.live_tokens()
    load.mark()
    if fatal:
        gateways.kill(which)
    else:
        gateways.signal(which, signal.SIGSTOP)
    until(lambda: gateways.owns(1 - which, 2), "the other gateway to have both pipelines", TIMEOUT_S)
    if fatal:
        gateways.start(which)
    else:
        gateways.signal(which, signal.SIGCONT)  # and finds itself fenced
    load.moved_on(time.monotonic(), streams, TIMEOUT_S)
    print(json.dumps({**line, "pause_s": round(load.longest_pause_s, 2), "live_tokens": live_tokens}), flush=True)
