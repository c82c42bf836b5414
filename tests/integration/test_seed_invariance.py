"""In batch-invariant mode a seed gives the same tokens alone and in any company: real weights, real stages, real engine."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from engine_helpers import collect, request

from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, ReplicaRecord
from gateway.tokenizer import load_tokenizer
from gateway.types import ModelInfo
from stages.checkpoint import open_checkpoint
from stages.replica import StageReplica, StageSpec
from tests.tiny import save_tiny

SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "top_k": 40, "seed": 3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "min_p": 0.05, "seed": 4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
)
NUM_TOKENS = 24


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
@pytest.mark.timeout(300)
async def test_alone_and_in_company(name: str, model_folder, tmp_path) -> None:
    folder = save_tiny(tmp_path / "tiny") if name == "tiny" else model_folder(name)
    checkpoint = open_checkpoint(str(folder))
    last = checkpoint.config.num_layers
    replicas = [
        StageReplica(
            StageSpec(model=str(folder), start_layer=a, end_layer=b, batch_invariant=True, num_blocks=96, num_threads=1)
        )
        for a, b in pairwise((0, last // 3, last))
    ]
    registry = Registry()
    engine = Engine(
        model=ModelInfo(
            name=name, fingerprint=checkpoint.fingerprint, max_context_tokens=256, vocab_size=checkpoint.config.vocab_size
        ),
        tokenizer=load_tokenizer(checkpoint.path),
        registry=registry,
        settings=EngineSettings(max_step_tokens=24, check_integrity=True),
        fingerprint=checkpoint.fingerprint,
    )  # fmt: skip
    try:
        for replica in replicas:
            await replica.start()
        await engine.start()
        registry.set_replicas("test", [ReplicaRecord(**replica.metadata()) for replica in replicas])
        async with asyncio.timeout(60):
            await engine.wait_ready()
        prompts = [tuple((31 * i + 7 * k) % 250 for k in range(1 + 9 * i)) for i in range(len(SAMPLING))]
        asked = [
            request(prompt, max_tokens=NUM_TOKENS, **sampling)
            for prompt, sampling in zip(prompts, SAMPLING, strict=True)
        ]
        alone = [(await collect(engine, one))[0].token_ids for one in asked]
        crowd = [request(tuple(range(k, k + 11)), max_tokens=30, temperature=1.0, seed=k) for k in range(6)]
        answers = await asyncio.gather(*(collect(engine, one) for one in [*crowd[:3], *asked, *crowd[3:]]))
        assert [answer[0].token_ids for answer in answers[3 : 3 + len(asked)]] == alone
        assert len({tuple(tokens) for tokens in alone}) == len(alone)
    finally:
        await engine.stop()
        for replica in replicas:
            await replica.stop()
