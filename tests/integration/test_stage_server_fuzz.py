"""Hostile bytes on every method of a stage, from a fixed seed: never a crash, never a hang, and it serves afterwards."""

from __future__ import annotations

import asyncio
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from engine_helpers import NUM_LAYERS, VOCAB_SIZE
from stage_server_helpers import FIRST, LAST, Client, int32, refusal, running, step

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.server.frames import StepFrame, encode
from stages.server.intake import Intake

SERVICE = "/stageline.stage.v1.StageService/"
MAX_UINT32, MAX_UINT64 = (1 << 32) - 1, (1 << 64) - 1
UINT32 = (0, 1, 2, 3, 4, 5, 64, 255, 256, 257, 1 << 16, (1 << 31) - 1, 1 << 31, MAX_UINT32)
INT32 = (-(1 << 31), -1, 0, 0, 1, 2, 63, 64, 255, 256, 257, (1 << 31) - 1)
FLOAT = (-math.inf, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, 1.2, 1e38, math.inf, math.nan)
ALLOWED = {
    "OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNIMPLEMENTED",
}  # fmt: skip


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """Bits turned, bytes replaced, cut, repeated, doubled, or noise."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(7):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 9)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 5:
                data[at:at] = rng.randbytes(rng.randrange(1, 17))
            case 6 if len(data) >= 8:
                at = rng.randrange(len(data) - 7)
                data[at : at + 8] = rng.choice((0, 1, 1 << 31, MAX_UINT32, 1 << 63, MAX_UINT64)).to_bytes(8, "little")
    return bytes(data)


def odd_step(rng: random.Random, step_id: int) -> pb.Step:
    """A Step that parses, from values at the edges; about half of its parts are right."""

    def ints(right: int) -> bytes:
        count = right if rng.random() < 0.8 else rng.randrange(5)
        return int32(*(rng.choice(INT32) if rng.random() < 0.1 else rng.randrange(64) for _ in range(count)))

    what = pb.Step(step_id=step_id)
    total = 0
    for _ in range(rng.randrange(4)):
        num_tokens = rng.choice((1, 1, 2, 7)) if rng.random() < 0.85 else rng.choice(UINT32)
        context = num_tokens + rng.choice((0, 0, 4, 30)) if rng.random() < 0.85 else rng.choice(UINT32)
        total += num_tokens if num_tokens < 1000 else 1
        row = what.rows.add(
            sequence_id=rng.choice((0, 1, MAX_UINT64)), num_tokens=num_tokens, context_len=min(context, MAX_UINT32),
            block_table=ints(-(-context // 4) if context < 1000 else 3),
        )  # fmt: skip
        if rng.random() < 0.7:
            row.sampling.CopyFrom(odd_sampling(rng))
        if rng.random() < 0.05:
            row.scoring.num_logprobs = rng.choice(UINT32)
        if rng.random() < 0.2:
            row.scoring.target_ids = ints(rng.choice((1, 2, num_tokens if num_tokens < 1000 else 3)))
            row.scoring.first_token = rng.choice((0, 0, 0, 1, MAX_UINT32))
            row.scoring.alternative_ids = ints(rng.choice((0, 0, 1, 50)))
    what.token_ids = ints(total)
    what.released_sequence_ids.extend(rng.choices((0, 1, 2, MAX_UINT64), k=rng.randrange(3)))
    return what


def odd_sampling(rng: random.Random) -> pb.Sampling:
    """From values at the edges; about half of the fields are left as a sane client sends them."""
    out = pb.Sampling(top_p=1.0, repetition_penalty=1.0)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        if rng.random() < 0.3:
            setattr(out, name, rng.choice(FLOAT))
    for name in ("top_k", "num_logprobs", "choice_index", "output_position"):
        if rng.random() < 0.3:
            setattr(out, name, rng.choice(UINT32))
    out.seed = rng.choice((0, 1, MAX_UINT64))
    out.logprobs = rng.random() < 0.5
    if rng.random() < 0.3:
        out.suppressed_token_ids.extend(rng.choices(UINT32, k=2))
    if rng.random() < 0.3:
        out.bias_token_ids.extend(rng.choices((0, 1, VOCAB_SIZE - 1, VOCAB_SIZE, MAX_UINT32), k=2))
        out.bias_values.extend(rng.choices(FLOAT, k=rng.choice((2, 2, 1))))
    if rng.random() < 0.3:
        ids = [rng.choice(INT32) if rng.random() < 0.2 else 5 for _ in range(4)]
        out.registration.prompt_token_ids = int32(*ids) + rng.choice((b"", b"", b"\x01"))
        out.registration.output_token_ids = int32(*ids[:2])
    if rng.random() < 0.2:
        out.allowed_token_bitmask = rng.randbytes(rng.choice((-(-VOCAB_SIZE // 8), 1)))
    return out


def hostile_streams(
    rng: random.Random, epoch: int, count: int, payload: bytes, next_step: Callable[[], int]
) -> Iterator[list[bytes]]:
    """Messages of Forward streams; `next_step` gives the step that the stage would take."""
    element_type = 1 if payload else 0
    for _ in range(count):
        kind, number = rng.randrange(4), next_step()
        if kind == 0:
            yield [rng.randbytes(rng.choice((0, 1, 39, 40, 41, 200)))]
            continue
        what = odd_step(rng, number) if kind == 1 else step(number, rng.choice((1, 3, 8)), answer=rng.random() < 0.5)
        header = what.SerializeToString()
        if kind == 2:
            header = mutate(rng, header)
        tokens = sum(min(row.num_tokens, 1000) for row in what.rows)
        frame = StepFrame(
            epoch, number, header, b"", element_type, payload * tokens, failed=rng.random() < 0.05 and not payload
        )
        messages = list(encode(frame))
        if kind == 3:
            at = rng.randrange(len(messages))
            messages[at] = mutate(rng, messages[at])
            if rng.random() < 0.2:
                rng.shuffle(messages)
        yield messages


def intake(stage: Client) -> Intake:
    """Of the stage's current epoch."""
    return stage.server._epoch._intake


async def push_stream(stage: Client, epoch: int, messages: list[bytes]) -> str:
    """Write a whole stream and close it; the code it ends with."""
    call = stage.forward(epoch)
    try:
        for message in messages:
            await call.write(message)
        await call.done_writing()
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        pass  # refused before its end
    return (await asyncio.wait_for(call.code(), 10)).name


@pytest.mark.parametrize(("layers", "seed"), [((0, NUM_LAYERS), 1), (LAST, 2)], ids=["whole", "last"])
async def test_hostile_forward_streams(layers: tuple[int, int], seed: int) -> None:
    rng = random.Random(seed)
    payload = b"" if layers[0] == 0 else struct.pack("<f", 7.0)
    async with running(layers) as stage:
        epoch = await stage.start()
        results = stage.results(epoch)
        answers: list[pb.StepResult] = []

        async def read() -> None:
            while (message := await results.read()) is not grpc.aio.EOF:
                answers.append(pb.StepResult.FromString(message))

        reading = asyncio.create_task(read())
        codes: dict[str, int] = {}
        for messages in hostile_streams(rng, epoch, 700, payload, lambda: intake(stage).last_step + 1):
            code = await push_stream(stage, epoch, messages)
            codes[code] = codes.get(code, 0) + 1
        assert set(codes) <= {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}, codes
        assert codes["OK"] > 100
        assert codes["INVALID_ARGUMENT"] > 100
        assert not reading.done()
        assert stage.server.failure is None
        assert (await stage.state(), await stage.health()) == ("CONNECTED", "SERVING")
        await asyncio.sleep(0.1)
        reasons = {answer.error.reason for answer in answers if answer.HasField("error")}
        assert "MALFORMED_STEP" in reasons
        assert any(answer.rows for answer in answers)
        unexpected = {answer.error.message for answer in answers if answer.error.reason == "STEP_FAILED"}
        assert unexpected == set(), "a check is missing: the kernel met what should have been refused"
        reading.cancel()
        results.cancel()
        await stage.good_step()


def control_requests(epoch: int, incarnation: str) -> dict[str, Any]:
    """A request of each control method that would succeed."""
    return {
        "Describe": pb.DescribeRequest(),
        "Claim": pb.ClaimRequest(owner_id="o", incarnation=incarnation, lease_s=30.0),
        "Connect": pb.ConnectRequest(epoch=epoch, num_blocks=8),
        "Renew": pb.RenewRequest(epoch=epoch, incarnation=incarnation),
        "Release": pb.ReleaseRequest(epoch=epoch, incarnation=incarnation),
        "Watch": pb.WatchRequest(epoch=epoch, incarnation=incarnation),
    }


async def call_raw(stage: Client, method: str, raw: bytes) -> tuple[str, str, bytes]:
    """Code, details and answer of a call with these bytes."""
    if method == "Watch":
        call = stage.channel.unary_stream(SERVICE + method)(raw, timeout=5)
        work = call.read()
    else:
        call = work = stage.channel.unary_unary(SERVICE + method)(raw, timeout=5)
    try:
        answer = await asyncio.wait_for(work, 6)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or "", b""
    finally:
        call.cancel()
    return "OK", "", answer


async def test_hostile_control_calls() -> None:
    rng = random.Random(3)
    async with running() as stage:
        refused = 0
        for number in range(600):
            epoch = (await stage.describe()).epoch
            method, request = rng.choice(list(control_requests(epoch, stage.incarnation).items()))
            raw = rng.randbytes(rng.randrange(60)) if number % 4 == 0 else mutate(rng, request.SerializeToString())
            code, details, answer = await call_raw(stage, method, raw)
            if code in ("INTERNAL", "UNKNOWN"):  # gRPC's own answer to bytes that are no message
                assert "DecodeError" in details or "deserializing" in details, (method, raw, details)
            else:
                assert code in ALLOWED, (method, raw, code, details)
            refused += code != "OK"
            if method == "Claim" and code == "OK":  # another owner may hold it now, for any time
                await stage.release(pb.ClaimResponse.FromString(answer).epoch)
        assert refused > 200
        assert (stage.server.failure, await stage.health()) == (None, "SERVING")
        await stage.good_step()


@pytest.mark.parametrize(
    "address",
    ["", "nowhere", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999999", "127.0.0.1:-1", ":", "unix:/nowhere/at/all", "\0", "ä:1", "a" * 5000, "ftp://x:1", "[::1"],
)  # fmt: skip
async def test_addresses_of_neighbours_that_are_none(address: str) -> None:
    async with running(FIRST) as stage:
        epoch = (await stage.claim()).epoch
        code, _ = await refusal(stage.connect(epoch, timeout_s=0.3, address=address, epoch=1, incarnation="x"))
        assert code in ("INVALID_ARGUMENT", "UNAVAILABLE", "DEADLINE_EXCEEDED")
        assert await stage.state() == "CLAIMED"
        await stage.release(epoch)
        await stage.claim("other")
