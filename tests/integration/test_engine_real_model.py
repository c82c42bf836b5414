"""The engine over real stages of a real checkpoint says what transformers says, greedily, in float32."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
import torch
from engine_helpers import collect, request

from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, ReplicaRecord
from gateway.tokenizer import load_tokenizer
from gateway.types import ModelInfo
from stages.checkpoint import open_checkpoint
from stages.replica import StageReplica, StageSpec

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time", "1, 2, 3, 4,", "Stageline"]
NUM_TOKENS = 24


def reference(folder, prompts, penalty: float) -> list[list[int]]:
    """Greedy tokens of transformers, one prompt at a time, with the end token allowed like any other."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0, "repetition_penalty": penalty}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return answers


async def test_greedy_equals_transformers(model_folder):
    cuts = (0, 7, 30)
    folder = model_folder("smollm2")
    checkpoint = open_checkpoint(str(folder))
    tokenizer = load_tokenizer(checkpoint.path)
    replicas = [
        StageReplica(
            StageSpec(model=str(folder), start_layer=a, end_layer=b, dtype="float32", num_blocks=64, num_threads=1)
        )
        for a, b in pairwise(cuts)
    ]
    registry = Registry()
    engine = Engine(
        model=ModelInfo(
            name="smollm2",
            fingerprint=checkpoint.fingerprint,
            max_context_tokens=512,
            vocab_size=checkpoint.config.vocab_size,
        ),
        tokenizer=tokenizer,
        registry=registry,
        settings=EngineSettings(max_step_tokens=8, check_integrity=True),
        fingerprint=checkpoint.fingerprint,
    )
    try:
        for replica in replicas:
            await replica.start()
        await engine.start()
        registry.set_replicas("test", [ReplicaRecord(**replica.metadata()) for replica in replicas])
        async with asyncio.timeout(60):
            await engine.wait_ready()
        prompts = [tokenizer.encode(text) for text in PROMPTS]
        for penalty in (1.0, 1.3):
            what = [request(prompt, max_tokens=NUM_TOKENS, repetition_penalty=penalty) for prompt in prompts]
            answers = await asyncio.gather(*(collect(engine, one) for one in what))
            got = [answer[0].token_ids for answer in answers]
            assert got == reference(folder, prompts, penalty)
            assert [answer[0].text for answer in answers] == [tokenizer.decode(ids) for ids in got]
    finally:
        await engine.stop()
        for replica in replicas:
            await replica.stop()
