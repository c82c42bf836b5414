"""What lm-evaluation-harness sends and reads (`local-completions`), over real sockets, stages and weights, against transformers
in float32: its requests and its reading of the answers are written out here, since its package isn't there in the tests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
import torch
from real_prompts import PROMPTS as ALL_PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from stageline.client import AsyncClient
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import scoring_pb2
from tests.integration.doors_helpers import open_doors
from tests.integration.test_structured_output import serving

PROMPTS = ALL_PROMPTS[::3]
TOLERANCE = 1e-3  # of a log-likelihood
CONTINUATIONS = (" Paris", " a city of light, and of rain.\n\nIt", "???")
BATCH = 5
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
async def doors(model_folder):
    folder = model_folder("smollm2")
    async with (
        serving(folder, (0, 11, 30)) as (frontend, _, _),
        open_doors(SimpleNamespace(frontend=frontend, folder=folder)) as opened,
    ):
        yield opened


@pytest.fixture
def reference(model_folder):
    folder = model_folder("smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@torch.inference_mode()
def expected(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of the continuation, and whether every token of it is the likeliest."""
    logits_TV = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].float()
    targets_T = torch.tensor(continuation)
    logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(1, targets_T[:, None])[:, 0]
    return float(logprobs_T.sum()), bool((logits_TV.argmax(dim=-1) == targets_T).all())


async def tokenize(web: httpx.AsyncClient, text: str) -> list[int]:
    """As the harness does where `/tokenizer_info` answers."""
    answer = await web.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
    return answer.raise_for_status().json()["tokens"]


async def loglikelihood(
    web: httpx.AsyncClient, prompts: list[list[int]], ctxlens: list[int]
) -> list[tuple[float, bool]]:
    """The harness's request for so many prompts at once, and its reading of the answer."""
    body = {
        "model": (await web.get("/v1/models")).json()["data"][0]["id"],
        "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip
    answer = (await web.post("/v1/completions", json=body)).raise_for_status().json()
    found = []
    for choice, ctxlen in zip(sorted(answer["choices"], key=lambda one: one["index"]), ctxlens, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        tops = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        found.append((sum(logprobs), all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True))))
    return found


async def test_loglikelihoods(doors, reference):
    model, tokenizer = reference
    async with httpx.AsyncClient(base_url=doors.http, timeout=300) as web, AsyncClient(doors.grpc) as client:
        assert (await web.get("/tokenizer_info")).json()["eos_token"] == tokenizer.eos_token
        contexts = await asyncio.gather(*(tokenize(web, text) for text in PROMPTS))
        assert contexts == [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
        continuations = list(await asyncio.gather(*(tokenize(web, text) for text in CONTINUATIONS)))
        # What the model itself would say: the only continuation here that is greedy.
        with torch.inference_mode():
            logits_BV = [model(torch.tensor([context])).logits[0, -1] for context in contexts]
        pairs = [
            (context, continuation)
            for context, logits_V in zip(contexts, logits_BV, strict=True)
            for continuation in [*continuations, [int(logits_V.argmax())]]
        ]
        # Several prompts a request, as `batch_size` has it, and fewer in the last.
        batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
        answers = await asyncio.gather(
            *(loglikelihood(web, [a + b for a, b in batch], [len(a) for a, _ in batch]) for batch in batches)
        )
        scored = await asyncio.gather(
            *(
                client.score(
                    scoring_pb2.ScoreRequest(
                        token_ids=gen.TokenIds(ids=context),
                        continuations=[
                            scoring_pb2.Continuation(token_ids=gen.TokenIds(ids=continuation))
                            for other, continuation in pairs
                            if other is context
                        ],
                    )
                )
                for context in contexts
            )
        )
    by_echo = [one for answer in answers for one in answer]
    by_score = [(score.sum_logprob, score.is_greedy) for answer in scored for score in answer.scores]
    assert any(greedy for _, greedy in by_score)
    for place, (context, continuation) in enumerate(pairs):
        logprob, greedy = expected(model, context, continuation)
        for way in (by_echo[place], by_score[place]):
            assert way[0] == pytest.approx(logprob, abs=TOLERANCE), (context, continuation)
            assert way[1] == greedy, (context, continuation)
