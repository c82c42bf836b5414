"""Clients that read slowly or not at all: memory stays bounded, others do not notice, and in the end the server hangs up."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import grpc.aio
import httpx
import pytest
from engine_helpers import expected_tokens
from process_nursery import nursery
from prometheus_client.parser import text_string_to_metric_families

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

NUM_SLOW = 6  # of each kind
NUM_TOKENS = 600
NUM_LOGPROBS = 20
MAX_UNREAD = 8192
WRITE_TIMEOUT_S = 6.0
# A log-probability takes 130 bytes; kept as it comes, what is not read would be three times as much.
MOST_MIB = 3 * NUM_SLOW * MAX_UNREAD * 150 / 2**20
# What fits between the server and a reader that does not read, else the kernel and gRPC swallow megabytes.
SMALL_WINDOW = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16384),
    ("grpc.use_local_subchannel_pool", 1),
)


@pytest.fixture(scope="module")
def gateway():
    with nursery() as children:
        stages = [children.stage(start, end, num_blocks=9600) for start, end in ((0, 2), (2, 4))]
        yield children.gateway(
            stages,
            settings={"max_unread_tokens": MAX_UNREAD},
            max_context_tokens=4096,
            write_timeout_s=WRITE_TIMEOUT_S,
            send_buffer_bytes=16384,
        )


def rss_mib(gateway) -> float:
    status = Path(f"/proc/{gateway['pid']}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def metric(gateway, name: str) -> float:
    async with httpx.AsyncClient() as web:
        text = (await web.get(f"{gateway['http']}/metrics")).text
    families = text_string_to_metric_families(text)
    return sum(s.value for family in families for s in family.samples if s.name == f"stageline:{name}")


def generation(prompt, max_tokens: int, num_logprobs: int | None = None) -> gen.Generation:
    return gen.Generation(
        token_ids=gen.TokenIds(ids=prompt),
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        output=None if num_logprobs is None else gen.OutputOptions(num_logprobs=num_logprobs),
    )


async def read_slowly(gateway, place: int, pause_s: float, times: float = float("inf")) -> tuple[list[int], int, str]:
    """Pause before each message, `times` times: tokens, messages, and the error that ended it if one did."""
    async with grpc.aio.insecure_channel(gateway["grpc"], options=SMALL_WINDOW) as channel:
        call = InferenceServiceStub(channel).StreamGenerate(
            pb.StreamGenerateRequest(generation=generation([place, 1], NUM_TOKENS, NUM_LOGPROBS))
        )
        tokens, messages = [], 0
        try:
            while isinstance(message := await call.read(), pb.StreamGenerateResponse):
                tokens += [token for choice in message.choices for token in choice.token_ids]
                messages += 1
                if messages <= times:
                    await asyncio.sleep(pause_s)
        except grpc.aio.AioRpcError as error:
            return tokens, messages, f"{error.code().name}: {error.details()}"
        return tokens, messages, ""


def connect_and_forget(gateway, place: int) -> socket.socket:
    """An HTTP client with a small window that sends its request and never reads."""
    host, port = gateway["http"].removeprefix("http://").split(":")
    body = json.dumps({
        "model": "toy", "prompt": [place, 2], "max_tokens": NUM_TOKENS, "stream": True, "n": 4, "logprobs": NUM_LOGPROBS,
        "temperature": 0, "ignore_eos": True,
    })  # fmt: skip
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.sendall(
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}".encode()
    )
    return client


async def others(stub, over: asyncio.Event) -> list[float]:
    """Short requests one after the other, each of them right; seconds each took."""
    seconds = []
    while not over.is_set():
        began_s = time.monotonic()
        answer = await stub.Generate(pb.GenerateRequest(generation=generation([9, 9], 20)), timeout=30)
        assert list(answer.choices[0].token_ids) == expected_tokens([9, 9], 20, num_stages=2)
        seconds.append(time.monotonic() - began_s)
    return seconds


async def test_slow_readers_cost_bounded_memory_and_others_nothing(gateway):
    async with grpc.aio.insecure_channel(gateway["grpc"]) as channel:
        stub = InferenceServiceStub(channel)
        await stub.Generate(pb.GenerateRequest(generation=generation([1], 50, NUM_LOGPROBS)))
        before_mib, over, watched = rss_mib(gateway), asyncio.Event(), []
        beside = asyncio.create_task(others(stub, over))
        slow = [asyncio.create_task(read_slowly(gateway, place, 0.05)) for place in range(NUM_SLOW)]
        stalled = [
            asyncio.create_task(read_slowly(gateway, place, 2.5 * WRITE_TIMEOUT_S, 1)) for place in range(NUM_SLOW)
        ]
        silent = [await asyncio.to_thread(connect_and_forget, gateway, place) for place in range(NUM_SLOW)]
        async with asyncio.timeout(90):
            while not all(task.done() for task in slow + stalled):
                watched.append((rss_mib(gateway), await metric(gateway, "unread_tokens")))
                await asyncio.sleep(0.2)
            while await metric(gateway, "num_open_requests") > 1:  # noqa: ASYNC110 (those that never read)
                await asyncio.sleep(0.1)
        over.set()
        assert len(await beside) > 10
        for client in silent:
            client.close()
        most_mib, most_unread = max(mib for mib, _ in watched), max(unread for _, unread in watched)
        assert most_mib - before_mib < MOST_MIB + 16, f"{before_mib:.0f} MiB before, {most_mib:.0f} at most"
        assert 1000 < most_unread <= 3 * NUM_SLOW * MAX_UNREAD
        for place, task in enumerate(slow):
            tokens, messages, error = await task
            # What waits is merged, so one who reads twenty messages a second has read everything in a few seconds.
            assert (tokens, error) == (expected_tokens([place, 1], NUM_TOKENS, num_stages=2), "")
            assert messages < 0.9 * NUM_TOKENS
        for place, task in enumerate(stalled):
            tokens, _, error = await task
            assert error.startswith("RESOURCE_EXHAUSTED: the client reads too slowly"), error
            assert 0 < len(tokens) < NUM_TOKENS
            assert tokens == expected_tokens([place, 1], len(tokens), num_stages=2), (
                "what it has is whole: it may resume"
            )
        await asyncio.sleep(1.5)
        assert await metric(gateway, "invariant_violations_total") == 0
        assert await metric(gateway, "invariant_checks_total") > 0
