"""The gateway is killed again and again in mid-stream; the client's answers are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stageline.client import AsyncClient, Backoff, Client
from stageline.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb

HERE = Path(__file__).parent
QUICK = Backoff(initial_s=0.05, max_s=0.3)


class Gateway:
    """A gateway process that is killed and started again on the same port."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        path = os.pathsep.join([str(HERE), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "toy_gateway.py"), str(self.port)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    running = Gateway()
    yield running
    running.kill()


def generations() -> list[gen.Generation]:
    """Greedy and seeded, two choices, stop strings that are held back, characters of several bytes, log-probabilities."""
    stop = gen.StopConditions(max_tokens=150, ignore_eos=True)
    logprobs = gen.OutputOptions(num_logprobs=2)
    greedy, seeded = gen.SamplingParams(temperature=0, seed=3), gen.SamplingParams(temperature=1.0, seed=7)
    with_stops = gen.StopConditions(max_tokens=150, ignore_eos=True, stop_strings=["never in here", "Ã©Ã©Ã©Ã©"])
    return [
        gen.Generation(token_ids=gen.TokenIds(ids=[1, 2, 3]), sampling=greedy, stop=stop),
        gen.Generation(token_ids=gen.TokenIds(ids=[9] * 20), sampling=seeded, stop=stop, output=logprobs),
        gen.Generation(token_ids=gen.TokenIds(ids=[5]), sampling=seeded, stop=with_stops, num_choices=2),
        gen.Generation(token_ids=gen.TokenIds(ids=list(range(40))), sampling=greedy, stop=with_stops, output=logprobs),
    ]


def plain(answer: pb.GenerateResponse) -> pb.GenerateResponse:
    """Without what differs between any two calls."""
    copy = pb.GenerateResponse()
    copy.CopyFrom(answer)
    copy.start.request_id, copy.start.created_s = "", 0
    copy.usage.cached_prompt_tokens = 0
    return copy


@pytest.mark.timeout(240)
def test_twenty_kills_change_nothing(gateway: Gateway) -> None:
    asked = generations()
    with Client(gateway.address) as calm:
        expected = [plain(calm.generate(generation)) for generation in asked]
    assert [len(answer.choices) for answer in expected] == [1, 1, 2, 1]
    over = threading.Event()
    faults: list[str] = []
    rounds = [0, 0]

    def blocking() -> None:
        with Client(gateway.address, backoff=QUICK) as client:
            while not over.is_set():
                for place, generation in enumerate(asked):
                    if plain(client.generate(generation)) != expected[place]:
                        faults.append(f"sync {place}")
                rounds[0] += 1

    async def concurrent() -> None:
        async with AsyncClient(gateway.address, backoff=QUICK) as client:
            while not over.is_set():
                answers = await asyncio.gather(*(client.generate(generation) for generation in asked))
                faults.extend(f"async {i}" for i, answer in enumerate(answers) if plain(answer) != expected[i])
                rounds[1] += 1

    threads = [threading.Thread(target=blocking), threading.Thread(target=lambda: asyncio.run(concurrent()))]
    for thread in threads:
        thread.start()
    rng = random.Random(20)
    try:
        for _ in range(20):
            time.sleep(rng.uniform(0.05, 0.7))
            gateway.kill()
            gateway.start()
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not faults
    assert min(rounds) >= 1


def test_another_address_takes_over(gateway: Gateway) -> None:
    second = Gateway()
    try:
        [generation, *_] = generations()
        with Client([gateway.address, second.address], backoff=QUICK) as client:
            expected = client.generate(generation)
            messages = client.stream_generate(generation)
            got = [next(messages) for _ in range(20)]
            gateway.kill()
            got += messages
        assert [t for m in got for c in m.choices for t in c.token_ids] == list(expected.choices[0].token_ids)
        assert "".join(c.text for m in got for c in m.choices) == expected.choices[0].text
        assert sum(m.HasField("start") for m in got) == sum(m.HasField("usage") for m in got) == 1
        assert got[-1].usage == expected.usage
    finally:
        second.kill()
        gateway.start()


def test_the_deadline_bounds_all_attempts() -> None:
    with Client("127.0.0.1:1", backoff=QUICK) as client:
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            client.get_model(timeout_s=1.0)
        assert time.monotonic() - began < 5


async def test_errors_are_typed_and_not_retried(gateway: Gateway) -> None:
    wrong = gen.Generation(token_ids=gen.TokenIds(ids=[1]), sampling=gen.SamplingParams(temperature=-1))
    slow = generations()[0]
    with Client(gateway.address) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            client.generate(wrong)
        assert "temperature" in caught.value.message
        with pytest.raises(DeadlineExceededError):
            client.generate(slow, timeout_s=0.2)
        assert client.get_model().name == "toy"
        assert client.detokenize(pb.DetokenizeRequest(token_ids=[1])).text
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(InvalidArgumentError):
            await client.generate(wrong)
        assert (await client.tokenize(pb.TokenizeRequest(text="a"))).token_ids


def test_closing_the_iterator_cancels_the_request(gateway: Gateway) -> None:
    [generation, *_] = generations()
    with Client(gateway.address) as client:
        messages = client.stream_generate(generation)
        next(messages)
        next(messages)
        messages.close()
        deadline = time.monotonic() + 5
        while client.get_model().pipelines[0].num_running_sequences:
            assert time.monotonic() < deadline
            time.sleep(0.02)
