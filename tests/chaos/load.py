"""Streams that run all the time while a scenario does harm; every answer is compared with that of an undisturbed run."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from stageline.client import Backoff, Client
from stageline.errors import StagelineError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

REQUEST_TIMEOUT_S = 300.0  # of a scenario that takes two minutes: who waits for so long was forgotten
ON_ITS_WAY_S = 0.5  # what was computed before a loss has reached its client by then


def make_requests(rng: random.Random, count: int, num_tokens: int, vocab_size: int) -> list[gen.Generation]:
    """Greedy and seeded requests; a third of the prompts share a long beginning, so that the prefix cache is hit."""
    shared = [rng.randrange(1, vocab_size) for _ in range(70)]
    requests = []
    for index in range(count):
        own = [rng.randrange(1, vocab_size) for _ in range(rng.randrange(1, 100))]
        sampling = gen.SamplingParams(temperature=0)
        if index % 2:
            sampling = gen.SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=rng.getrandbits(63))
        requests.append(
            gen.Generation(
                token_ids=gen.TokenIds(ids=shared + own if index % 3 == 0 else own),
                sampling=sampling,
                stop=gen.StopConditions(max_tokens=num_tokens, ignore_eos=True),
            )
        )
    return requests


@dataclass
class Load:
    """What the streams have seen. `addresses`: one gateway is called without retries, so that an error of any call is a
    fault; `resuming` calls through the client library, which goes on where a gateway was lost."""

    addresses: Sequence[str]
    requests: Sequence[gen.Generation]
    resuming: bool = False
    timeout_s: float = 1800.0  # of a request
    expected: dict[int, list[int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_ended: int = 0
    last_token_s: float = 0.0
    longest_pause_s: float = (
        0.0  # of any stream, since `mark`: from one token to the next, or from the call to the first
    )
    live: dict[int, int] = field(default_factory=dict)  # tokens of each running stream, prompt included
    _seen_s: dict[int, float] = field(default_factory=dict)  # when each thread's stream had its last token
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.stub = InferenceServiceStub(grpc.insecure_channel(self.addresses[0]))
        backoff = Backoff(initial_s=0.05, max_s=0.5)
        self._client = Client(self.addresses, backoff=backoff) if self.resuming else None

    def stream(self, index: int) -> list[int]:
        """Run one request to its end."""
        generation, thread = self.requests[index], threading.get_ident()
        tokens: list[int] = []
        last_s = time.monotonic()
        for response in self._call(generation):
            for delta in response.choices:
                tokens += delta.token_ids
                now_s = time.monotonic()
                with self._lock:
                    self.num_tokens += len(delta.token_ids)
                    self.longest_pause_s = max(self.longest_pause_s, now_s - last_s)
                    self.last_token_s = self._seen_s[thread] = last_s = now_s
                    self.live[thread] = len(generation.token_ids.ids) + len(tokens)
        self.live.pop(thread, None)
        self.num_ended += 1
        return tokens

    def _call(self, generation: gen.Generation) -> Iterable[pb.StreamGenerateResponse]:
        if self._client is not None:
            return self._client.stream_generate(generation, timeout_s=self.timeout_s)
        return self.stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation), timeout=self.timeout_s)

    def live_tokens(self) -> int:
        """Tokens of all running streams: what is computed again where all of them lose their pipeline."""
        return sum(list(self.live.values()))

    def mark(self) -> None:
        """Measure `longest_pause_s` from here on; pauses that are under way count whole."""
        with self._lock:
            self.longest_pause_s = 0.0

    def moved_on(self, since_s: float, num_streams: int, timeout_s: float) -> None:
        """Returns once each of `num_streams` has had a token that was computed after `since_s`. Raises TimeoutError, and
        RuntimeError where there is a fault already."""
        end_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if sum(seen_s > since_s + ON_ITS_WAY_S for seen_s in self._seen_s.values()) >= num_streams:
                    return
            if self.faults:
                raise RuntimeError(self.faults[0])
            if time.monotonic() > end_s:
                raise TimeoutError(f"some stream had no token within {timeout_s} s")
            time.sleep(0.01)

    def learn(self, num_streams: int) -> None:
        """The undisturbed answers."""
        self._run(num_streams, range(len(self.requests)), self.expected.__setitem__)

    def disturb(self, num_streams: int, over: threading.Event) -> None:
        """Ask again and again until `over`; what differs from the undisturbed answer is a fault."""

        def check(index: int, tokens: list[int]) -> None:
            if tokens != self.expected[index]:
                place = next((i for i, pair in enumerate(zip(tokens, self.expected[index], strict=False)) if pair[0] != pair[1]), "end")  # fmt: skip
                self.faults.append(f"request {index}: {len(tokens)} tokens, the first difference at {place}")

        self._run(num_streams, self._again(over), check)

    @contextlib.contextmanager
    def running(self, num_streams: int) -> Iterator[None]:
        """The streams run within the block, and end after it."""
        over = threading.Event()
        self._seen_s.clear()
        thread = threading.Thread(target=self.disturb, args=(num_streams, over))
        thread.start()
        try:
            self.moved_on(0.0, num_streams, 120.0)
            yield
        finally:
            over.set()
            thread.join()

    def _again(self, over: threading.Event) -> Iterator[int]:
        while not over.is_set():
            yield from range(len(self.requests))

    def _run(self, num_streams: int, indices: Iterable[int], take: Callable[[int, list[int]], None]) -> None:
        work, lock = iter(indices), threading.Lock()

        def worker() -> None:
            while True:
                with lock:
                    index = next(work, None)
                if index is None:
                    return
                try:
                    take(index, self.stream(index))
                except grpc.RpcError as error:
                    self.faults.append(f"request {index}: {error.code()}: {error.details()}")
                except StagelineError as error:
                    self.faults.append(f"request {index}: {error.reason}: {error.message}")

        threads = [threading.Thread(target=worker) for _ in range(num_streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
