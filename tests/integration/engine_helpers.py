"""A toy language model in real stage servers, so that the engine is tested over real sockets.

Every stage keeps a number per KV slot and answers, for each token, a hash of all numbers of its sequence, which it reads
back through the block table; that hash is what the next stage keeps. So one wrong slot on any stage changes the output.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch

from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, ReplicaRecord, record_at
from gateway.tokenizer import Tokenizer
from gateway.types import ChoiceDelta, FinishReason, GenerateRequest, ModelInfo, SamplingParams
from stages.executor import StageExecutor
from stages.partition import LayerRange
from stages.server.access import OPEN, StageAccess
from stages.server.server import StageServer
from stages.transfers import NoTransfers

VOCAB_SIZE = 257
EOS = 256
NUM_LAYERS = 4
BLOCK_TOKENS = 4
FINGERPRINT = "toy"


def prefix_hashes(values: Sequence[int]) -> list[int]:
    """A hash of values[: t + 1] for each t; float32 holds it exactly."""
    hashes, value = [], 0
    for number in values:
        value = (value * 31 + number * 7 + 11) % 65521
        hashes.append(value)
    return hashes


def logits_of(value: int) -> np.ndarray:
    """float32 [VOCAB_SIZE] of one hash."""
    return np.random.default_rng(value).normal(size=VOCAB_SIZE).astype(np.float32)


def expected_tokens(prompt: Sequence[int], count: int, *, num_stages: int, suppressed: Sequence[int] = ()) -> list[int]:
    """What the toy says greedily, computed without caches."""
    tokens = list(prompt)
    for _ in range(count):
        values: Sequence[int] = tokens
        for _ in range(num_stages):
            values = prefix_hashes(values)
        logits = logits_of(values[-1])
        logits[list(suppressed)] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def expected_scores(tokens: Sequence[int], *, num_stages: int) -> list[float]:
    """What the toy thinks of each token but the first, computed without caches."""
    values: Sequence[int] = tokens
    for _ in range(num_stages):
        values = prefix_hashes(values)
    scores = []
    for value, token in zip(values[:-1], tokens[1:], strict=True):
        logits = logits_of(value).astype(np.float64)
        scores.append(float(logits[token] - np.log(np.exp(logits).sum())))
    return scores


class ToyRunner:
    """Takes the place of StageRunner. `delay_s` a step; `fail_token` makes a step that holds it fail, `nan_token` makes
    the logits after it NaN, `poison_token` calls `on_poison`, which is to end the stage."""

    dtype = torch.float32
    device = torch.device("cpu")
    block_size_tokens = BLOCK_TOKENS
    attention_report = "toy"
    quantization = None
    transfers = NoTransfers()

    def __init__(
        self,
        layers: LayerRange,
        delay_s: float = 0.0,
        fail_token: int = -1,
        nan_token: int = -1,
        poison_token: int = -1,
    ) -> None:
        self.config = SimpleNamespace(num_layers=NUM_LAYERS, hidden_size=1, vocab_size=VOCAB_SIZE)
        self.layers, self.delay_s, self.fail_token, self.nan_token = layers, delay_s, fail_token, nan_token
        self.poison_token, self.on_poison = poison_token, lambda: None
        last = layers.end_layer == NUM_LAYERS
        self.model = SimpleNamespace(is_first=layers.start_layer == 0, is_last=last, batch_invariant=False)
        self.num_blocks = 0
        self._slots = np.zeros(0, dtype=np.int64)

    def allocate_kv(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._slots = np.full(num_blocks * BLOCK_TOKENS, -1, dtype=np.int64)

    def execute(self, batch, hidden_TD, on_scored=None):
        time.sleep(self.delay_s)
        if self.poison_token in batch.token_ids:
            self.on_poison()
            time.sleep(0.2)  # no result of this step is ever seen
        if self.fail_token in batch.token_ids:
            raise RuntimeError("toy failure")
        values = batch.token_ids if hidden_TD is None else hidden_TD[:, 0].to(torch.int64).numpy()
        self._slots[batch.slots] = values
        out = np.zeros(len(values), dtype=np.float32)
        for row, length in enumerate(batch.context_lens):
            positions = np.arange(length)
            slots = batch.block_tables[row, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
            start, end = batch.query_starts[row : row + 2]
            out[start:end] = prefix_hashes(self._slots[slots].tolist())[length - (end - start) :]
        if not self.model.is_last:
            return torch.from_numpy(out).reshape(-1, 1)
        if on_scored is not None:
            for place, token in enumerate(batch.scored_tokens):
                scored = np.full(VOCAB_SIZE, np.nan, dtype=np.float32)
                if batch.token_ids[token] != self.nan_token:
                    scored = logits_of(int(out[token]))
                on_scored(place, torch.from_numpy(scored)[None])
        logits = np.zeros((len(batch.output_rows), VOCAB_SIZE), dtype=np.float32)
        for index, row in enumerate(batch.output_rows):
            end = batch.query_starts[row + 1] - 1
            logits[index] = np.nan if batch.token_ids[end] == self.nan_token else logits_of(int(out[end]))
        return torch.from_numpy(logits)


@dataclass
class ToyStage:
    """One running stage server."""

    server: StageServer
    runner: ToyRunner
    record: ReplicaRecord


@dataclass
class Cluster:
    """Toy stages, the registry that knows them and an engine over them."""

    registry: Registry = field(default_factory=Registry)
    stages: list[ToyStage] = field(default_factory=list)
    engine: Engine | None = None
    access: StageAccess = OPEN

    async def add_stage(
        self, start: int, end: int, *, num_blocks: int = 64, queue_depth: int = 8, **faults
    ) -> ToyStage:
        """Start a stage and announce it."""
        runner = ToyRunner(LayerRange(start, end), **faults)
        server = StageServer(
            StageExecutor(runner), fingerprint=FINGERPRINT, kv_capacity_blocks=num_blocks, queue_depth_steps=queue_depth
        )
        port = await server.start("127.0.0.1", 0, self.access)
        record = await record_at(f"127.0.0.1:{port}", access=self.access)
        stage = ToyStage(server, runner, record)
        self.stages.append(stage)
        self.announce()
        return stage

    async def kill(self, stage: ToyStage) -> None:
        """End a stage's server at once; the registry still lists it until `announce`."""
        self.stages.remove(stage)
        await stage.server.stop()

    def announce(self) -> None:
        """Tell the registry what runs."""
        self.registry.set_replicas("test", [stage.record for stage in self.stages])

    async def start(self, *, eos_token_ids: tuple[int, ...] = (), **settings) -> Engine:
        """An engine over these stages, ready to serve. Without an end token there are no grammars."""
        self.engine = Engine(
            model=ModelInfo(
                name="toy",
                fingerprint=FINGERPRINT,
                max_context_tokens=200,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=eos_token_ids,
            ),
            tokenizer=byte_tokenizer(),
            registry=self.registry,
            settings=EngineSettings(
                **{"check_integrity": True, "lease_s": 2.0, "stage_access": self.access, **settings}
            ),
            fingerprint=FINGERPRINT,
        )
        await self.engine.start()
        return self.engine

    async def stop(self) -> None:
        """End everything."""
        if self.engine is not None:
            await self.engine.stop(0.0)
        for stage in list(self.stages):
            await self.kill(stage)


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens and one special token; the toy's ids are not their bytes, only their order in the alphabet."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()  # llguidance reads the kind of vocabulary from it
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    return Tokenizer(backend)


def request(prompt: Sequence[int], **changes) -> GenerateRequest:
    """Greedy, no end token, 16 tokens, unless `changes` says otherwise (fields of both dataclasses)."""
    outer = {name: changes.pop(name) for name in list(changes) if name in GenerateRequest.__dataclass_fields__}
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **changes})
    return GenerateRequest(request_id="test", prompt_token_ids=tuple(prompt), sampling=sampling, **outer)


@dataclass
class Answer:
    """All deltas of one choice put together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str = ""
    cached_prompt_tokens: int = 0
    prompt_logprobs: tuple | None = None

    def take(self, delta: ChoiceDelta) -> None:
        assert self.finish_reason is None, "a delta after the last one"
        assert delta.prompt_logprobs is None or not self.token_ids, "they come first, and once"
        self.prompt_logprobs = delta.prompt_logprobs if delta.prompt_logprobs is not None else self.prompt_logprobs
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish_reason, self.matched_stop = delta.finish_reason, delta.matched_stop
        self.cached_prompt_tokens = delta.cached_prompt_tokens


async def collect(engine: Engine, what: GenerateRequest) -> dict[int, Answer]:
    """Run a request to its end: choice index → answer."""
    answers: dict[int, Answer] = {}
    async for delta in engine.generate(what):
        answers.setdefault(delta.index, Answer()).take(delta)
    return answers


async def until(condition, timeout_s: float = 10.0) -> None:
    """Poll until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def all_free(engine: Engine) -> bool:
    """Whether every KV block of every pipeline is free."""
    return all(p.num_free_blocks == p.num_blocks for p in engine.pipelines())
