"""The gateway is killed again and again in mid-stream; the client's answers are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time

import pytest
from engine_helpers import byte_tokenizer

from stageline.client import AsyncClient, Backoff, ChannelOptions, Client
from stageline.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    StagelineError,
    UnavailableError,
)
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb

QUICK = Backoff(initial_s=0.05, max_s=0.3)
NUM_KILLS = 20


def asked(prompt: list[int], **fields) -> gen.Generation:
    """150 tokens, greedy, of characters with two bytes and their halves."""
    tokenizer = byte_tokenizer()
    ids = {tokenizer.token_bytes(i): i for i in range(256)}
    bias = {ids[bytes([byte])]: 100.0 for byte in "éö a".encode()}
    generation = gen.Generation(
        token_ids=gen.TokenIds(ids=prompt),
        sampling=gen.SamplingParams(temperature=0, seed=3, logit_bias=bias),
        stop=gen.StopConditions(max_tokens=150, ignore_eos=True),
    )
    generation.MergeFrom(gen.Generation(**fields))
    return generation


def seeded(seed: int) -> gen.SamplingParams:
    return gen.SamplingParams(temperature=1.0, seed=seed)


def late_stop(text: str) -> str:
    """A piece of the text that stands first in its second half, with a character of several bytes."""
    for place in range(len(text) * 2 // 3, len(text) - 6):
        piece = text[place : place + 6]
        if text.find(piece) == place and not piece.isascii() and "\ufffd" not in piece:
            return piece
    raise AssertionError(f"no such piece in {text!r}")


def generations(calm: Client) -> list[gen.Generation]:
    """Greedy and seeded, one and two choices, log-probabilities, stop strings that are held back and that match late."""
    logprobs = gen.OutputOptions(num_logprobs=2)
    greedy = asked([1, 2, 3])
    sampled = asked([9] * 20, sampling=seeded(7), output=logprobs)
    two = asked([5], sampling=seeded(8), output=logprobs, num_choices=2)
    stops = [late_stop(calm.generate(generation).choices[0].text) for generation in (sampled, two)]
    for generation, stop in zip((sampled, two), stops, strict=True):
        generation.stop.stop_strings.extend([stop, stop[:-1] + "never"])
    return [greedy, sampled, two, asked(list(range(40)), output=logprobs)]


def plain(answer: pb.GenerateResponse) -> pb.GenerateResponse:
    """Without what differs between any two calls."""
    copy = pb.GenerateResponse()
    copy.CopyFrom(answer)
    copy.start.request_id, copy.start.created_s = "", 0
    copy.usage.cached_prompt_tokens = 0
    return copy


@pytest.mark.timeout(480)  # 20 gateways start one after another: a minute on an idle machine
def test_twenty_kills_change_nothing(gateway, caplog):
    with Client(gateway.address) as calm:
        wanted = generations(calm)
        expected = [plain(calm.generate(generation)) for generation in wanted]
    assert [len(answer.choices) for answer in expected] == [1, 1, 2, 1]
    assert expected[0].usage.completion_tokens == 150
    assert "é" in expected[0].choices[0].text
    for answer, generation in zip(expected[1:3], wanted[1:3], strict=True):
        assert answer.choices[0].matched_stop == generation.stop.stop_strings[0]
        assert 75 < len(answer.choices[0].token_ids) < 150
    caplog.clear()
    over = threading.Event()
    faults: list[str] = []
    rounds = [0, 0]

    def blocking() -> None:
        try:
            with Client(gateway.address, backoff=QUICK) as client:
                while not over.is_set():
                    for place, generation in enumerate(wanted):
                        if plain(client.generate(generation, timeout_s=60)) != expected[place]:
                            faults.append(f"sync {place}")
                    rounds[0] += 1
        except Exception as error:
            faults.append(f"sync {error!r}")

    async def concurrent() -> None:
        try:
            async with AsyncClient(gateway.address, backoff=QUICK) as client:
                while not over.is_set():
                    calls = (client.generate(generation, timeout_s=60) for generation in wanted)
                    for place, answer in enumerate(await asyncio.gather(*calls)):
                        if plain(answer) != expected[place]:
                            faults.append(f"async {place}")
                    rounds[1] += 1
        except Exception as error:
            faults.append(f"async {error!r}")

    threads = [threading.Thread(target=blocking), threading.Thread(target=lambda: asyncio.run(concurrent()))]
    for thread in threads:
        thread.start()
    rng = random.Random(20)
    try:
        for _ in range(NUM_KILLS):
            time.sleep(rng.uniform(0.1, 0.9))
            gateway.kill()
            gateway.start()
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not faults
    assert min(rounds) >= 1
    # Both clients always have a stream open: every kill broke one at least.
    assert sum("trying again" in record.message for record in caplog.records) >= NUM_KILLS


def test_another_address_takes_over(gateway, children):
    with children.toy_gateway() as second:
        with Client([gateway.address, second.address], backoff=QUICK) as client:
            generation = generations(client)[0]
            expected = client.generate(generation)
            messages = client.stream_generate(generation)
            got = [next(messages) for _ in range(20)]
            gateway.kill()
            got += messages
            assert client.get_model(timeout_s=5).name == "toy"  # goes to the second at once
    assert [t for m in got for c in m.choices for t in c.token_ids] == list(expected.choices[0].token_ids)
    assert "".join(c.text for m in got for c in m.choices) == expected.choices[0].text
    assert sum(m.HasField("start") for m in got) == sum(m.HasField("usage") for m in got) == 1
    assert got[-1].usage == expected.usage


async def test_a_gateway_that_hangs_is_left_by_keepalive(gateway, children):
    channel = ChannelOptions(keepalive_s=1, keepalive_timeout_s=1)
    generation = asked([4, 5])
    with children.toy_gateway() as second:
        async with AsyncClient([gateway.address, second.address], backoff=QUICK, channel=channel) as client:
            expected = await client.generate(generation)
            messages = client.stream_generate(generation, timeout_s=30)
            got = [await anext(messages) for _ in range(10)]
            gateway.signal(signal.SIGSTOP)
            got += [message async for message in messages]
    assert [t for m in got for c in m.choices for t in c.token_ids] == list(expected.choices[0].token_ids)


def test_another_model_is_not_gone_on_with(gateway, children):
    with children.toy_gateway(fingerprint="other") as other:
        with Client([gateway.address, other.address], backoff=QUICK) as client:
            messages = client.stream_generate(asked([1]))
            for _ in range(10):
                next(messages)
            gateway.kill()
            with pytest.raises(FailedPreconditionError, match=r"'toy'.*'other'.*begin again") as caught:
                list(messages)
    assert caught.value.reason == "MODEL_FINGERPRINT_MISMATCH"


def test_the_deadline_bounds_all_attempts():
    with Client("127.0.0.1:1", backoff=QUICK) as client:
        began = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            client.get_model(timeout_s=1.0, request_id="mine")
        assert time.monotonic() - began < 5
        assert caught.value.metadata["request_id"] == "mine"


async def test_errors_are_typed_and_not_retried(gateway, caplog):
    wrong = gen.Generation(token_ids=gen.TokenIds(ids=[1]), sampling=gen.SamplingParams(temperature=-1))
    with Client(gateway.address) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            client.generate(wrong)
        assert "temperature" in caught.value.message
        with pytest.raises(DeadlineExceededError):
            client.generate(asked([1]), timeout_s=0.2)
        assert client.get_model().name == "toy"
        assert client.detokenize(pb.DetokenizeRequest(token_ids=[1])).text
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(InvalidArgumentError):
            await client.generate(wrong)
        assert (await client.tokenize(pb.TokenizeRequest(text="a"))).token_ids
    assert "trying again" not in caplog.text


def test_best_of_is_served(gateway):
    generation = asked([1], sampling=seeded(5), best_of=3)
    with Client(gateway.address) as client:
        answer = client.generate(generation)
    assert len(answer.choices) == 1
    assert answer.usage.completion_tokens == 3 * 150


def until_idle(client: Client) -> None:
    deadline = time.monotonic() + 5
    while client.get_model().pipelines[0].num_running_sequences:
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_closing_or_cancelling_ends_the_request(gateway):
    with Client(gateway.address) as client:
        messages = client.stream_generate(asked([1], num_choices=2))
        next(messages), next(messages)
        messages.close()
        until_idle(client)
        async with AsyncClient(gateway.address) as other:
            task = asyncio.create_task(other.generate(asked([1])))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(until_idle, client)


async def test_a_closed_client_says_so(gateway):
    client = Client(gateway.address)
    messages = client.stream_generate(asked([1]))
    next(messages)
    client.close()
    other = AsyncClient(gateway.address)
    task = asyncio.create_task(other.generate(asked([1])))
    await asyncio.sleep(0.2)
    await other.close()
    for call in (lambda: list(messages), client.get_model):
        with pytest.raises(StagelineError) as caught:
            call()
        assert caught.value.reason == "CLIENT_CLOSED"
    for pending in (task, other.get_model()):
        with pytest.raises(FailedPreconditionError, match="closed"):
            await pending
