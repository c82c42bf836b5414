"""Cancel requests at random moments and compare every other stream with an undisturbed run: `make cancels CANCELS=10000`.

Real processes: stages (the toy model of the tests, or `--model FOLDER` in batch-invariant mode) and a gateway with both
doors. Requests are cancelled in the queue, in prefill, in decode, at once, and while stages are killed; witness streams
run all the time. Exit code 1 where a witness token differs, a stream stalls, or the idle gateway finds a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from process_nursery import Nursery, nursery

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.ports import free_ports

STALL_S = 120.0  # with a real model on a busy machine, behind a stage that is started again
SETTINGS = {"max_waiting_sequences": 48, "max_step_tokens": 48, "max_step_sequences": 12, "lease_s": 2.0}


def metric(text: str, name: str) -> float:
    """The sum of a metric's samples in Prometheus' text."""
    families = text_string_to_metric_families(text)
    return sum(s.value for family in families for s in family.samples if s.name == f"stageline:{name}")


@dataclass
class Load:
    """Requests that are cancelled, and witnesses that are not. `expected[i]` is the answer of witness i."""

    grpc_address: str
    http_address: str
    vocab_size: int
    longest_prompt: int
    longest_answer: int
    rng: random.Random
    expected: list[list[int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    witnessed: int = 0
    longest_gap_s: float = 0.0

    async def __aenter__(self) -> Load:
        self._channels = [
            grpc.aio.insecure_channel(self.grpc_address, options=(("grpc.use_local_subchannel_pool", 1),))
            for _ in range(4)
        ]
        self._stubs = [InferenceServiceStub(channel) for channel in self._channels]
        self._web = httpx.AsyncClient(base_url=self.http_address, timeout=60)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._web.aclose()
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    def generation(self, prompt: Sequence[int], max_tokens: int, **fields: Any) -> gen.Generation:
        """Greedy, to the last token."""
        return gen.Generation(
            token_ids=gen.TokenIds(ids=prompt),
            sampling=gen.SamplingParams(temperature=0),
            stop=gen.StopConditions(max_tokens=max_tokens, ignore_eos=True),
            **fields,
        )

    def prompt(self, rng: random.Random) -> list[int]:
        """Half of them begin alike, so that their blocks are shared."""
        length = rng.randrange(1, self.longest_prompt)
        shared = [7 * i % self.vocab_size for i in range(length // 2)] if rng.random() < 0.5 else []
        return shared + [rng.randrange(self.vocab_size) for _ in range(length - len(shared))]

    async def witness(self, index: int) -> list[int]:
        """Stream answer `index`; every witness sees a token at least every STALL_S seconds."""
        rng = random.Random(1000 + index)
        tokens: list[int] = []
        call = self._stubs[index % 4].StreamGenerate(
            pb.StreamGenerateRequest(generation=self.generation(self.prompt(rng), self.longest_answer))
        )
        last_s = time.monotonic()
        try:
            while isinstance(response := await asyncio.wait_for(call.read(), STALL_S), pb.StreamGenerateResponse):
                tokens += [token for delta in response.choices for token in delta.token_ids]
                self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - last_s)
                last_s = time.monotonic()
        except TimeoutError:
            self.faults.append(f"witness {index} saw no token for {STALL_S} s after {len(tokens)} tokens")
            call.cancel()
        return tokens

    async def learn(self, count: int) -> None:
        """The undisturbed answers."""
        self.expected = [await self.witness(index) for index in range(count)]

    async def watch(self, index: int, over: asyncio.Event) -> None:
        """Ask for the same answer again and again."""
        while not over.is_set():
            try:
                tokens = await self.witness(index)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # the queue was full: politely refused
                    self.outcomes["witness refused"] += 1
                    await asyncio.sleep(0.05)
                    continue
                self.faults.append(f"witness {index}: {error.code().name}: {error.details()}")
                return
            self.witnessed += len(tokens)
            if tokens != self.expected[index]:
                self.faults.append(f"witness {index}: {len(tokens)} tokens, not those of the undisturbed run")

    async def cancelled(self) -> None:
        """One request, given up at a random moment through a random door; refused ones do not count."""
        while not await self._cancelled():  # noqa: ASYNC110
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    async def _cancelled(self) -> bool:
        """False where the gateway refused it because its queue was full."""
        rng = self.rng
        prompt, max_tokens = self.prompt(rng), rng.randrange(1, 2 * self.longest_answer)
        num_choices = rng.choice([1, 1, 1, 3])
        # At once, somewhere in queue or prefill, after some tokens, or never before its end.
        after_s = rng.choice([0.0, rng.expovariate(100), rng.expovariate(5)])
        after_tokens = rng.choice([None, None, rng.randrange(1, max_tokens + 1)])
        if rng.random() < 0.2:
            return await self._cancelled_http(prompt, max_tokens, num_choices, after_s)
        generation = self.generation(prompt, max_tokens, num_choices=num_choices)
        call = rng.choice(self._stubs).StreamGenerate(pb.StreamGenerateRequest(generation=generation))

        async def read() -> None:
            seen = 0
            while isinstance(response := await call.read(), pb.StreamGenerateResponse):
                seen += len(response.choices)
                if after_tokens is not None and seen >= after_tokens:
                    return

        outcome = "ended"
        try:
            await asyncio.wait_for(read(), None if after_tokens is not None else after_s)
            outcome = "cancelled after tokens" if after_tokens is not None else outcome
        except TimeoutError:
            outcome = "cancelled after a time"
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.faults.append(f"{error.code().name}: {error.details()}")
        finally:
            call.cancel()
        self.outcomes[outcome] += 1
        return outcome != "RESOURCE_EXHAUSTED"

    async def _cancelled_http(self, prompt: list[int], max_tokens: int, num_choices: int, after_s: float) -> bool:
        body = {
            "model": "toy", "prompt": prompt, "max_tokens": max_tokens, "n": num_choices, "temperature": 0,
            "ignore_eos": True, "stream": self.rng.random() < 0.5,
        }  # fmt: skip
        # A connection of its own, closed in mid-answer: HTTP has no other way to cancel.
        host, port = self.http_address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        try:
            status = (await asyncio.wait_for(reader.readline(), after_s)).split()[1].decode()
            if status not in ("200", "429"):
                self.faults.append(f"HTTP {status}: {(await reader.read(2000))[-300:]!r}")
            outcome = f"http: {status}"
            if status == "200":
                await asyncio.wait_for(reader.read(), after_s)
        except TimeoutError:
            outcome = "http: disconnected"
        finally:
            writer.close()
        self.outcomes[outcome] += 1
        return outcome != "http: 429"

    async def until_recovered(self, kill: Callable[[], None]) -> None:
        """Kill a stage and wait until it was started again and streams went on: a request that stages die of again and
        again without a token in between would count as their killer."""
        recoveries = await self._read("num_recoveries_total")
        await asyncio.to_thread(kill)
        async with asyncio.timeout(2 * STALL_S):
            while await self._read("num_recoveries_total") == recoveries:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            tokens = await self._read("generation_tokens_total")
            while await self._read("generation_tokens_total") < tokens + 200:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def _read(self, name: str) -> float:
        return metric((await self._web.get("/metrics")).text, name)

    async def settled(self) -> str:
        """/metrics once the gateway has been idle and checked itself."""
        before = metric((await self._web.get("/metrics")).text, "invariant_checks_total")
        async with asyncio.timeout(STALL_S):
            while True:
                text = (await self._web.get("/metrics")).text
                if metric(text, "invariant_checks_total") > before:
                    return text
                await asyncio.sleep(0.1)


async def run(load: Load, *, cancels: int, parallel: int, witnesses: int, kill: Callable[[], None], kills: int) -> dict:
    """Cancel, watch, kill now and then; returns what happened, with every fault."""
    async with load:
        await load.learn(witnesses)
        over, left, killing = asyncio.Event(), iter(range(cancels)), asyncio.Lock()

        async def worker() -> None:
            for done in left:
                await load.cancelled()
                if kills and done % (cancels // kills) == cancels // kills // 2:
                    async with killing:  # the others go on cancelling meanwhile
                        await load.until_recovered(kill)

        began_s = time.monotonic()
        watching = [asyncio.create_task(load.watch(index, over)) for index in range(witnesses)]
        await asyncio.gather(*(worker() for _ in range(parallel)))
        over.set()
        await asyncio.gather(*watching)
        seconds = time.monotonic() - began_s
        await load.witness(0)  # so that a check comes after everything
        text = await load.settled()
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "invariant_violations_total",
        ):
            if metric(text, name):
                load.faults.append(f"{name} is {metric(text, name)} in an idle gateway")
    return {
        "cancels": cancels, "seconds": round(seconds, 1), "outcomes": dict(sorted(load.outcomes.items())),
        "witness_tokens": load.witnessed, "longest_gap_s": round(load.longest_gap_s, 2),
        "recoveries": metric(text, "num_recoveries_total"), "preemptions": metric(text, "num_preemptions_total"),
        "faults": load.faults,
    }  # fmt: skip


class ToyStages:
    """Two toy stages; `kill` ends one of them and starts it again on its port."""

    def __init__(self, children: Nursery, rng: random.Random, num_blocks: int = 96) -> None:
        self._children, self._rng, self._lock = children, rng, threading.Lock()
        self._options = [
            {"start": start, "end": end, "num_blocks": num_blocks, "delay_s": 0.001} for start, end in ((0, 2), (2, 4))
        ]
        self.running = [children.stage(**options) for options in self._options]

    def kill(self) -> None:
        """SIGKILL, then the same stage anew."""
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        place = self._rng.randrange(len(self.running))
        victim = self.running[place]
        self._children.signal(victim, signal.SIGKILL)
        _until_gone(victim["pid"])
        port = int(victim["address"].rpartition(":")[2])
        self.running[place] = self._children.stage(**self._options[place], port=port)


class ModelStages:
    """Two stages of a checkpoint, as `python -m stages`."""

    def __init__(self, model: str, num_layers: int, rng: random.Random, dtype: str) -> None:
        self._model, self._rng, self._dtype, self._lock = model, rng, dtype, threading.Lock()
        cut = num_layers // 2
        self._layers = (f"0-{cut}", f"{cut}-{num_layers}")
        self._processes = list(map(self._start, self._layers, free_ports(len(self._layers))))
        self.running = [self._ready(process) for process in self._processes]

    def kill(self) -> None:
        """SIGKILL, then the same stage anew on the same port."""
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        place = self._rng.randrange(2)
        self._processes[place].kill()
        self._processes[place].wait()
        port = int(self.running[place]["address"].rpartition(":")[2])
        self._processes[place] = self._start(self._layers[place], port)
        self.running[place] = self._ready(self._processes[place])

    def _start(self, layers: str, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "stages", "--model", self._model, "--layers", layers, "--port", str(port),
                   "--dtype", self._dtype, "--batch-invariant", "--num-blocks", "256", "--num-threads", "1"]  # fmt: skip
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _ready(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        return {"pid": process.pid, "address": process.stdout.readline().split()[1].removeprefix("grpc://")}

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.wait()


def _until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.001)


@contextmanager
def toy_load(children: Nursery, seed: int) -> Iterator[tuple[Load, ToyStages]]:
    """The toy model behind a gateway."""
    rng = random.Random(seed)
    stages = ToyStages(children, rng)
    gateway = children.gateway(stages.running, settings=SETTINGS)
    yield Load(gateway["grpc"], gateway["http"], 256, 60, 40, rng), stages


def main() -> int:
    """Exit code 0 where nothing leaked, stalled or differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint; default: the tests' toy")
    parser.add_argument("--dtype", default="float32", help="of --model")
    parser.add_argument("--cancels", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--witnesses", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with nursery() as children, contextlib.ExitStack() as stack:
        if args.model is None:
            load, stages = stack.enter_context(toy_load(children, args.seed))
        else:
            config = json.loads((Path(args.model) / "config.json").read_text())
            rng = random.Random(args.seed)
            stages = ModelStages(args.model, config["num_hidden_layers"], rng, args.dtype)
            stack.callback(stages.close)
            gateway = children.gateway(
                stages.running,
                settings={**SETTINGS, "max_waiting_sequences": 12},
                model=args.model,
                max_context_tokens=1024,
            )
            load = Load(gateway["grpc"], gateway["http"], config["vocab_size"], 32, 12, rng)
        summary = asyncio.run(
            run(load, cancels=args.cancels, parallel=args.parallel, witnesses=args.witnesses, kill=stages.kill,
                kills=args.kills)
        )  # fmt: skip
    print(json.dumps({"seed": args.seed, "model": os.path.basename(args.model or "toy"), **summary}, indent=2))
    return 1 if summary["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
