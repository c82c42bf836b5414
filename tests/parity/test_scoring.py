"""Log-probabilities of prompts and continuations against transformers, in float32, through real stages and the engine."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import torch
from tiny import save_tiny, tiny_model

from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, ReplicaRecord
from gateway.tokenizer import load_tokenizer
from gateway.types import GenerateRequest, ModelInfo, SamplingParams, ScoreRequest
from stages.attention import branches
from stages.checkpoint import open_checkpoint
from stages.logits import Scorer
from stages.replica import StageReplica, StageSpec
from stages.runner import SCORED_AT_ONCE

VOCAB_SIZE = 384


@asynccontextmanager
async def serving(folder, cuts, **settings):
    checkpoint = open_checkpoint(str(folder))
    specs = [
        StageSpec(model=str(folder), start_layer=a, end_layer=b, dtype="float32", num_blocks=128, num_threads=1)
        for a, b in pairwise(cuts)
    ]
    replicas, registry = [StageReplica(spec) for spec in specs], Registry()
    info = ModelInfo(
        name="tiny",
        fingerprint=checkpoint.fingerprint,
        max_context_tokens=512,
        vocab_size=checkpoint.config.vocab_size,
    )
    engine = Engine(
        model=info,
        tokenizer=load_tokenizer(checkpoint.path),
        registry=registry,
        settings=EngineSettings(check_integrity=True, **settings),
        fingerprint=checkpoint.fingerprint,
    )
    try:
        for replica in replicas:
            await replica.start()
        await engine.start()
        registry.set_replicas("test", [ReplicaRecord(**replica.metadata()) for replica in replicas])
        async with asyncio.timeout(60):
            await engine.wait_ready()
        yield engine
    finally:
        await engine.stop()
        for replica in replicas:
            await replica.stop()


def reference(model, tokens) -> torch.Tensor:
    """float32 [P - 1, V]: the distribution of each token but the first."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].float(), dim=-1)


def check(entries, tokens, logprobs_SV) -> None:
    """Entries of the last tokens against the last rows."""
    targets = tokens[len(tokens) - len(entries) :]
    logprobs_SV = logprobs_SV[len(logprobs_SV) - len(entries) :]
    assert [entry.token_id for entry in entries] == list(targets)
    for entry, target, logprobs_V in zip(entries, targets, logprobs_SV, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs_V[target]), abs=1e-4)
        values, _ = logprobs_V.topk(len(entry.top))
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        for token_id, value in entry.top:
            assert value == pytest.approx(float(logprobs_V[token_id]), abs=1e-4)
        above = int((logprobs_V > logprobs_V[target] + 1e-4).sum())
        assert above < entry.rank <= int((logprobs_V > logprobs_V[target] - 1e-4).sum())


@pytest.mark.parametrize(
    ("cuts", "max_step_tokens", "num_context"), [((0, 4), 512, 45), ((0, 1, 3, 4), 33, 45), ((0, 2, 4), 512, 100)]
)
async def test_the_tiny_model(tmp_path, monkeypatch, cuts, max_step_tokens, num_context):
    model = tiny_model()
    heights, add = [], Scorer.add
    together, attend = [], branches.attend
    monkeypatch.setattr(branches, "attend", lambda *given: (together.append(1), attend(*given))[1])
    monkeypatch.setattr(Scorer, "add", lambda self, at, x_SV: (heights.append(len(x_SV)), add(self, at, x_SV))[1])
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)) for length in (2, 31, 200)]
    context = tuple(rng.randrange(VOCAB_SIZE) for _ in range(num_context))
    continuations = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(1 + at % 6)) for at in range(24)]
    async with serving(save_tiny(tmp_path, model), cuts, max_step_tokens=max_step_tokens) as engine:

        async def generate(prompt):
            sampling = SamplingParams(temperature=0.0, max_tokens=3)
            what = GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, num_prompt_logprobs=5)
            return [delta async for delta in engine.generate(what)]

        async def score():
            what = ScoreRequest(
                request_id="s", context_token_ids=context, continuations=tuple(continuations), num_logprobs=3
            )
            return {one.index: one.logprobs async for one in engine.score(what)}

        scores, *answers = await asyncio.gather(score(), *map(generate, prompts))
    # Continuations of a long context meet it together.
    assert bool(together) == (num_context == 100)
    # However long the prompt, the logits of so many tokens are there together.
    assert max(heights) <= SCORED_AT_ONCE
    assert max_step_tokens < SCORED_AT_ONCE or SCORED_AT_ONCE in heights
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs_SV = reference(model, prompt)
        check(answer[0].prompt_logprobs, prompt, logprobs_SV)
        assert len(answer[0].prompt_logprobs) == len(prompt) - 1
        # What follows the prompt is what the same distribution says.
        tokens = list(prompt)
        for delta in answer:
            tokens += delta.token_ids
        assert tokens[len(prompt) :] == reference(model, (*tokens, 0))[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    for index, continuation in enumerate(continuations):
        tokens = context + continuation
        assert len(scores[index]) == len(continuation)
        check(scores[index], tokens, reference(model, tokens))
