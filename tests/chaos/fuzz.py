"""Hostile messages and strings at every port, while another client is served: `make fuzz`.

Half of `--messages` are mutated protobuf messages of every method of InferenceService, half frames and control calls of
StageService; `--strings` hostile strings go to a field each, at both doors in turn. The gateway (both doors, two toy stages)
runs in a process of its own. Exit code 1 where a call hangs, is answered with what no document promises (gRPC INTERNAL,
UNKNOWN, UNAVAILABLE, HTTP 5xx but 504), a witness stream is wrong or refused, or the idle gateway finds a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import test_stage_server_fuzz as stage_fuzz
from engine_helpers import NUM_LAYERS, VOCAB_SIZE, expected_tokens
from stage_server_helpers import LAST, running

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.chaos.fuzz_gateway import served
from tests.chaos.fuzz_messages import hostile_inference
from tests.chaos.fuzz_strings import grpc_request, hostile_string, http_request

SERVICE = "/stageline.inference.v1.InferenceService/"
DEADLINE_S, HANG_S = 5.0, 60.0  # the machine may be busy
PARALLEL = 8
PARTS = ("stage", "inference", "strings")
CODES = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "UNIMPLEMENTED",
}
STATUSES = {200, 400, 404, 405, 413, 422, 429, 431, 504}
WITNESS = [5, 6, 7, 8, 9, 10, 11]


@dataclass
class Findings:
    """What came back, by kind, and what should not have."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    witness_streams: int = 0
    slowest_witness_s: float = 0.0
    slowest_call_s: float = 0.0
    ends_s: float = math.inf

    @property
    def late(self) -> bool:
        """Whether the time for hostile calls is over."""
        return time.monotonic() > self.ends_s

    def count(self, kind: str, outcome: str) -> None:
        """One message or string was answered."""
        self.counts.setdefault(kind, Counter())[outcome] += 1

    def fault(self, text: str) -> None:
        """What must not be; the first of many are kept."""
        if len(self.faults) < 50:
            self.faults.append(text[:2000])


async def call(channel: grpc.aio.Channel, method: str, raw: bytes) -> tuple[str, str]:
    """Make a call with these bytes and read all of its answer. Its code and details."""
    if method == "StreamGenerate":
        stream = channel.unary_stream(SERVICE + method)(raw, timeout=DEADLINE_S)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in stream:
                pass
        return (await stream.code()).name, await stream.details() or ""
    try:
        await channel.unary_unary(SERVICE + method)(raw, timeout=DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


async def timed(
    findings: Findings,
    kind: str,
    what: Callable[[], Awaitable[tuple[str, str]]],
    shown: Callable[[], str],
    allowed: set[str],
) -> None:
    """One hostile call: count its outcome, or say what is wrong with it."""
    started_s = time.monotonic()
    try:
        async with asyncio.timeout(HANG_S):
            outcome, details = await what()
    except TimeoutError:
        findings.count(kind, "HUNG")
        findings.fault(f"no answer in {HANG_S} s: {shown()}")
        return
    except Exception as error:  # the connection broke
        findings.count(kind, "BROKEN")
        findings.fault(f"{type(error).__name__}: {error}: {shown()}")
        return
    findings.slowest_call_s = max(findings.slowest_call_s, time.monotonic() - started_s)
    findings.count(kind, outcome)
    if outcome not in allowed:
        findings.fault(f"{outcome} {details}: {shown()}")


async def in_parallel(work: Iterator[Awaitable[None]]) -> None:
    """PARALLEL at a time."""

    async def run() -> None:
        for one in work:
            await one

    async with asyncio.TaskGroup() as group:
        for _ in range(PARALLEL):
            group.create_task(run())


async def fuzz_inference(findings: Findings, address: str, count: int, rng: random.Random) -> None:
    """Mutated messages to every method of InferenceService."""
    async with grpc.aio.insecure_channel(address) as channel:

        def one() -> Awaitable[None]:
            method, raw = hostile_inference(rng)
            return timed(
                findings,
                "inference messages",
                lambda: call(channel, method, raw),
                lambda: f"{method} {raw.hex()}",
                CODES,
            )

        await in_parallel(one() for _ in range(count) if not findings.late)


async def fuzz_stage(findings: Findings, count: int, seed: int) -> None:
    """Hostile Forward streams and control calls to a stage; `count` messages in all."""
    rng = random.Random(seed)
    for layers, share in (((0, NUM_LAYERS), 0.45), (LAST, 0.45)):
        payload = b"" if layers[0] == 0 else struct.pack("<f", 7.0)
        left = round(count * share)
        async with running(layers) as stage:
            epoch = await stage.start()
            results = stage.results(epoch)
            reading = asyncio.create_task(_drain(results))
            renewing = asyncio.create_task(_renew(stage, epoch))
            streams = stage_fuzz.hostile_streams(
                rng, epoch, count, payload, lambda: stage_fuzz.intake(stage).last_step + 1
            )
            for messages in streams:
                left -= len(messages)
                try:
                    code = await stage_fuzz.push_stream(stage, epoch, messages)
                except TimeoutError:
                    code = "HUNG"
                findings.count("stage streams", code)
                findings.counts.setdefault("stage messages", Counter())["sent"] += len(messages)
                if code not in {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}:
                    findings.fault(f"stage: {code}: {[one.hex() for one in messages]}")
                if left <= 0 or findings.late:
                    break
            if stage.server.failure is not None or await stage.health() != "SERVING" or reading.done():
                findings.fault(f"stage: it does not serve after the streams: {stage.server.failure}")
            reading.cancel()
            renewing.cancel()
            results.cancel()
            await stage.good_step()
    async with running() as stage:
        for number in range(count - 2 * round(count * 0.45)):
            if findings.late:
                break
            epoch = (await stage.describe()).epoch
            method, request = rng.choice(list(stage_fuzz.control_requests(epoch, stage.incarnation).items()))
            raw = (
                rng.randbytes(rng.randrange(60))
                if number % 4 == 0
                else stage_fuzz.mutate(rng, request.SerializeToString())
            )
            try:
                code, details, answer = await stage_fuzz.call_raw(stage, method, raw)
            except TimeoutError:
                code, details, answer = "HUNG", "", b""
            findings.count("stage control calls", code)
            decoding = "DecodeError" in details or "deserializing" in details
            if code not in stage_fuzz.ALLOWED and not (code in ("INTERNAL", "UNKNOWN") and decoding):
                findings.fault(f"stage: {code} {details}: {method} {raw.hex()}")
            if method == "Claim" and code == "OK":
                await stage.release(stage_fuzz.pb.ClaimResponse.FromString(answer).epoch)
        if stage.server.failure is not None or await stage.health() != "SERVING":
            findings.fault(f"stage: it does not serve after the control calls: {stage.server.failure}")
        await stage.good_step()


async def _renew(stage: Any, epoch: int) -> None:
    while True:
        await asyncio.sleep(5.0)
        await stage.stub.Renew(stage_fuzz.pb.RenewRequest(epoch=epoch, incarnation=stage.incarnation))


async def _drain(results: Any) -> None:
    while await results.read() is not grpc.aio.EOF:
        pass


async def fuzz_strings(findings: Findings, grpc_address: str, url: str, count: int, rng: random.Random) -> None:
    """Hostile strings, at both doors in turn."""
    allowed = {str(status) for status in STATUSES}
    async with (
        grpc.aio.insecure_channel(grpc_address) as channel,
        httpx.AsyncClient(base_url=url, timeout=HANG_S, headers={"x-request-timeout-s": str(DEADLINE_S)}) as client,
    ):

        def one(number: int) -> Awaitable[None]:
            family, text = hostile_string(rng)
            findings.count("strings", family)
            if number % 2:
                method, raw = grpc_request(rng, family, text)
                return timed(
                    findings,
                    "strings over gRPC",
                    lambda: call(channel, method, raw),
                    lambda: f"{method} {raw[:600].hex()}",
                    CODES,
                )
            path, body, headers = http_request(rng, family, text)
            headers["content-type"] = "application/json"

            async def post() -> tuple[str, str]:
                answer = await client.post(path, content=body, headers=headers)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], "errors have OpenAI's form"
                if answer.status_code == 200 and re.search(rb'"code": ?"INTERNAL"', answer.content):
                    return "500", answer.text[-300:]  # of a stream that began well
                return str(answer.status_code), answer.text[:300]

            return timed(
                findings, "strings over HTTP", post, lambda: f"{family} {path} {headers} {body[:600]!r}", allowed
            )

        await in_parallel(one(number) for number in range(count) if not findings.late)


async def witness(findings: Findings, address: str) -> None:
    """A client that does nothing wrong, until cancelled: each of its streams must be complete and right."""
    expected = expected_tokens(WITNESS, 8, num_stages=2)
    what = gen.Generation(token_ids=gen.TokenIds(ids=WITNESS), sampling=gen.SamplingParams(temperature=0.0))
    what.stop.max_tokens, what.stop.ignore_eos = 8, True
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceServiceStub(channel)
        while True:
            started_s = time.monotonic()
            try:
                messages = [
                    one async for one in stub.StreamGenerate(pb.StreamGenerateRequest(generation=what), timeout=HANG_S)
                ]
                tokens = [i for one in messages for choice in one.choices for i in choice.token_ids]
                if tokens != expected:
                    findings.fault(f"witness: {tokens} is not {expected}")
            except grpc.aio.AioRpcError as error:
                findings.fault(f"witness: {error.code().name} {error.details()}")
            findings.witness_streams += 1
            findings.slowest_witness_s = max(findings.slowest_witness_s, time.monotonic() - started_s)
            await asyncio.sleep(0.02)


async def run(
    messages: int, strings: int, seed: int, parts: Sequence[str] = PARTS, minutes: float = math.inf, rounds: int = 1
) -> dict[str, Any]:
    """All of it, or some parts; what came out. `rounds`: how often the one gateway gets the same again."""
    started_s, held_s, grown, kept = time.monotonic(), 0.0, [], 0.0
    findings = Findings(ends_s=started_s + 60 * minutes)
    if "stage" in parts:
        await fuzz_stage(findings, messages // 2, seed)
    stage_s = time.monotonic() - started_s
    async with served() as (process, grpc_address, url):
        memory = psutil.Process(process.pid).memory_info
        other = asyncio.create_task(witness(findings, grpc_address))
        await asyncio.sleep(1.0)
        before = memory().rss
        try:
            for _ in range(rounds):
                if "inference" in parts:
                    await fuzz_inference(findings, grpc_address, messages - messages // 2, random.Random(seed + 1))
                if "strings" in parts:
                    await fuzz_strings(findings, grpc_address, url, strings, random.Random(seed + 2))
                grown.append(0 if process.returncode is not None else memory().rss - before)
        finally:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
        if process.returncode is not None:
            findings.fault(f"the gateway died with code {process.returncode}")
        else:
            await asyncio.sleep(2.0)  # the idle gateway looks for leaks
            async with httpx.AsyncClient(base_url=url) as client:
                text = (await client.get("/metrics")).text
            for name, wanted in (
                ("invariant_violations_total", 0.0),
                ("num_open_requests", 0.0),
                ("pipeline_ready", 1.0),
            ):
                found = [float(value) for value in re.findall(rf"^stageline:{name}{{.*}} (\S+)$", text, re.MULTILINE)]
                if found != [wanted]:
                    findings.fault(f"after it all {name} is {found}, expected {wanted}")
            process.stdin.close()
            said = (await asyncio.wait_for(process.stdout.readline(), 60)).split()
            held_s, kept = float(said[0]), int(said[1]) - before
    return {
        "parts": list(parts), "longest_hold_of_the_loop_cpu_s": held_s,
        "messages": messages, "strings": strings, "seed": seed, "vocab_size": VOCAB_SIZE,
        "seconds": round(time.monotonic() - started_s, 1), "seconds_stage": round(stage_s, 1),
        "counts": {kind: dict(counter) for kind, counter in findings.counts.items()},
        "witness_streams": findings.witness_streams, "slowest_witness_s": round(findings.slowest_witness_s, 3),
        "slowest_call_s": round(findings.slowest_call_s, 3), "memory_grown_mib": [round(one / 2**20, 1) for one in grown], "memory_kept_mib": round(kept / 2**20, 1),
        "faults": findings.faults,
    }  # fmt: skip


def main() -> None:
    """Prints a JSON summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, and say how much was done")
    parser.add_argument("--rounds", type=int, default=1, help="the same again at the same gateway; memory after each")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    summary = asyncio.run(run(args.messages, args.strings, args.seed, args.parts, args.minutes, args.rounds))
    print(json.dumps(summary, indent=2))
    sys.exit(1 if summary["faults"] else 0)


if __name__ == "__main__":
    main()
