"""Between the messages of Score and the gateway's own types."""

from __future__ import annotations

import math

from gateway.api import request_id
from gateway.api.grpc.conversation import chat_prompt
from gateway.api.grpc.convert import token_logprobs
from gateway.api.raw import Prompt, TextPrompt, TokenPrompt
from gateway.api.scoring import RawScore, Scored, is_greedy
from gateway.tokenizer import Tokenizer
from gateway.types import ContinuationScore, ModelInfo
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import scoring_pb2 as pb

NAMES = {"prompt": "context"}  # our field → the client's


def raw_score(request: pb.ScoreRequest, deadline_s: float | None) -> RawScore:
    """A ScoreRequest as it was sent."""
    return RawScore(
        context=_context(request),
        continuations=[_continuation(one) for one in request.continuations],
        model=request.model or None,
        request_id=request.request_id or request_id.current.get(),
        num_logprobs=request.num_logprobs if request.HasField("num_logprobs") else None,
        deadline_s=deadline_s,
        names=NAMES,
    )


def score_response(scored: Scored, num_logprobs: int, model: ModelInfo, tokenizer: Tokenizer) -> pb.ScoreResponse:
    """The answer; `num_logprobs` as the client asked."""
    request = scored.request
    return pb.ScoreResponse(
        request_id=request.request_id,
        model=model.name,
        model_fingerprint=model.fingerprint,
        scores=[_score(one, num_logprobs, tokenizer) for one in scored.scores],
        usage=gen.Usage(
            prompt_tokens=len(request.context_token_ids) + sum(map(len, request.continuations)),
            cached_prompt_tokens=scored.num_cached_tokens,
        ),
    )


def _score(score: ContinuationScore, num_logprobs: int, tokenizer: Tokenizer) -> pb.ContinuationScore:
    return pb.ContinuationScore(
        sum_logprob=math.fsum(entry.logprob for entry in score.logprobs),
        is_greedy=is_greedy(score),
        token_ids=[entry.token_id for entry in score.logprobs],
        token_logprobs=[entry.logprob for entry in score.logprobs],
        logprobs=[token_logprobs(entry, tokenizer) for entry in score.logprobs] if num_logprobs else (),
    )


def _context(request: pb.ScoreRequest) -> Prompt | None:
    kind = request.WhichOneof("context")
    if kind == "text":
        return TextPrompt(request.text)
    if kind == "conversation":
        return chat_prompt(request.conversation, "conversation")
    return TokenPrompt(tuple(request.token_ids.ids)) if kind == "token_ids" else None


def _continuation(message: pb.Continuation) -> TextPrompt | TokenPrompt | None:
    kind = message.WhichOneof("continuation")
    if kind == "text":
        return TextPrompt(message.text)
    return TokenPrompt(tuple(message.token_ids.ids)) if kind == "token_ids" else None
