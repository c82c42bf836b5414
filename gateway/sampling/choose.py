"""The choice: cut, draw, log-probabilities. Exact, in one trip, without the logits.

The kept set is a prefix of the sorted candidates (top-k, then top-p within it, then min-p), or reaches beyond them; then
the stage has said how much it weighs in all and drawn one token of the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.types import SamplingParams, TokenLogprobs
from stageline.errors import InternalError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.rng import STREAM_CHOICE, uniform


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, with log-probabilities where they were asked."""

    token_id: int
    logprobs: TokenLogprobs | None


def choose(result: pb.RowResult, params: SamplingParams, *, choice_index: int, position: int) -> Choice:
    """The token at `position` of the answer; the same inputs give the same token anywhere.

    Raises InternalError (reason NON_FINITE_LOGITS) where the model's logits were NaN or left nothing to choose.
    """
    if result.non_finite:
        raise InternalError("NON_FINITE_LOGITS", "the model's logits held no finite value to choose from")
    ids = np.frombuffer(result.candidate_ids, dtype="<i4")
    raw = np.frombuffer(result.candidate_raw_logits, dtype="<f4")
    if params.temperature == 0:
        token, raw_logit = int(ids[0]), float(raw[0])
    else:
        probabilities = kept_probabilities(result, params)
        draw = uniform(params.seed, choice_index, position, STREAM_CHOICE)
        place = int(np.searchsorted(probabilities.cumsum(), draw, side="right"))
        if place < len(probabilities):
            token, raw_logit = int(ids[place]), float(raw[place])
        elif result.HasField("tail"):
            token, raw_logit = result.tail.token_id, result.tail.raw_logit
        else:  # rounding: the sum fell short of the draw by an ulp
            token, raw_logit = int(ids[len(probabilities) - 1]), float(raw[len(probabilities) - 1])
    return Choice(token, _logprobs(result, params, token, raw_logit))


def kept_probabilities(result: pb.RowResult, params: SamplingParams) -> NDArray[np.float64]:
    """Probability of each kept candidate, in order. They sum to 1, or to less where a tail has the rest."""
    logits = np.frombuffer(result.candidate_logits, dtype="<f4").astype(np.float64)
    logits = logits[np.isfinite(logits)]  # masked tokens stand last; rounding of the draw must never reach them
    if result.HasField("tail"):
        return np.exp(logits - result.tail.kept_logsumexp)
    if params.top_k:
        logits = logits[: params.top_k]
    if params.top_p < 1:
        # Within top-k the nucleus is measured over the kept k, otherwise over the whole vocabulary.
        lse = _logsumexp(logits) if params.top_k else result.processed_logsumexp
        mass = np.exp(logits - lse)
        before = mass.cumsum() - mass
        logits = logits[: max(1, int((before < params.top_p).sum()))]
    if params.min_p > 0:
        logits = logits[: max(1, int((logits >= logits[0] + math.log(params.min_p)).sum()))]
    return np.asarray(np.exp(logits - _logsumexp(logits)))


def make_sampling(
    params: SamplingParams,
    *,
    choice_index: int,
    output_position: int,
    suppressed: tuple[int, ...] = (),
    registration: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> pb.Sampling:
    """What the last stage is asked for a row; `registration` is (prompt, generated so far)."""
    sampling = pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        suppressed_token_ids=suppressed,
        bias_token_ids=[token for token, _ in params.logit_bias],
        bias_values=[value for _, value in params.logit_bias],
        num_logprobs=params.num_logprobs or 0,
        logprobs=params.num_logprobs is not None,
        seed=params.seed,
        choice_index=choice_index,
        output_position=output_position,
    )
    if registration is not None:
        prompt, output = (np.array(ids, dtype="<i4").tobytes() for ids in registration)
        sampling.registration.CopyFrom(pb.Registration(prompt_token_ids=prompt, output_token_ids=output))
    return sampling


def _logprobs(result: pb.RowResult, params: SamplingParams, token: int, raw_logit: float) -> TokenLogprobs | None:
    if params.num_logprobs is None:
        return None
    ids = np.frombuffer(result.top_ids, dtype="<i4").tolist()
    values = np.frombuffer(result.top_raw_logits, dtype="<f4").tolist()
    lse = result.raw_logsumexp
    return TokenLogprobs(token, raw_logit - lse, tuple((i, v - lse) for i, v in zip(ids, values, strict=True)))


def _logsumexp(logits: NDArray[np.float64]) -> float:
    highest = float(logits[0])
    return highest + math.log(float(np.exp(logits - highest).sum()))
