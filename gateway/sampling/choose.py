"""The choice: cut, draw, log-probabilities. Exact, in one trip, without the logits.

The kept set is a prefix of the sorted candidates (top-k, then top-p within it, then min-p), or reaches beyond them; then
the stage has said how much it weighs in all and drawn one token of the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gateway.sampling.kept import kept_weights, places_in_matrix
from gateway.types import SamplingParams, TokenLogprobs
from stageline.errors import InternalError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.rng import STREAM_CHOICE, uniform, uniforms

_WIDEST = 512  # candidates of a row that is chosen together with others; padding would cost more than it saves
_FEWEST = 12  # rows that make a matrix worth its fixed cost (benchmarks/sampler.py)


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, with log-probabilities where they were asked."""

    token_id: int
    logprobs: TokenLogprobs | None


def choose(result: pb.RowResult, params: SamplingParams, *, choice_index: int, position: int) -> Choice:
    """The token at `position` of the answer; the same inputs give the same token anywhere.

    Raises InternalError (reason NON_FINITE_LOGITS) where the model's logits were NaN or left nothing to choose.
    """
    _check_finite(result)
    place, size = 0, 1
    if params.temperature > 0:
        weights, total = kept_weights(result, params)
        draw = uniform(params.seed, choice_index, position, STREAM_CHOICE)
        place, size = int(np.searchsorted(weights, draw * total, side="right")), len(weights)
    return _choice(result, params, place, size)


def choose_rows(
    results: Sequence[pb.RowResult],
    params: Sequence[SamplingParams],
    *,
    choice_indices: Sequence[int],
    positions: Sequence[int],
) -> list[Choice | InternalError]:
    """`choose` for the rows of a micro-batch, with the error in place of the token where it would have raised.

    Rows of up to 512 candidates are cut and drawn in one matrix.
    """
    together = [
        index
        for index, (result, asked) in enumerate(zip(results, params, strict=True))
        if asked.temperature > 0 and not result.non_finite and len(result.candidate_logits) <= 4 * _WIDEST
    ]
    if len(together) < _FEWEST:
        together = []
    chosen: dict[int, Choice | InternalError] = {}
    if together:
        numbers = uniforms(
            [params[i].seed for i in together],
            [choice_indices[i] for i in together],
            [positions[i] for i in together],
            STREAM_CHOICE,
        )
        places, sizes = places_in_matrix([results[i] for i in together], [params[i] for i in together], numbers)
        for index, place, size in zip(together, places, sizes, strict=True):
            chosen[index] = _choice(results[index], params[index], place, size)
    for index, (result, asked) in enumerate(zip(results, params, strict=True)):
        if index not in chosen:
            try:
                chosen[index] = choose(result, asked, choice_index=choice_indices[index], position=positions[index])
            except InternalError as error:
                chosen[index] = error
    return [chosen[index] for index in range(len(results))]


def _check_finite(result: pb.RowResult) -> None:
    if result.non_finite:
        raise InternalError("NON_FINITE_LOGITS", "the model's logits held no finite value to choose from")


def _choice(result: pb.RowResult, params: SamplingParams, place: int, size: int) -> Choice:
    """The candidate at `place` of the `size` kept ones; beyond them the stage's own draw."""
    if place >= size and result.HasField("tail"):
        token, raw_logit = result.tail.token_id, result.tail.raw_logit
    else:  # `place` is at most the last: rounding may have left the sum an ulp short of the draw
        at = 4 * min(place, size - 1)
        token = int.from_bytes(result.candidate_ids[at : at + 4], "little", signed=True)
        (raw_logit,) = struct.unpack_from("<f", result.candidate_raw_logits, at)
    return Choice(token, _logprobs(result, params, token, raw_logit))


def make_sampling(
    params: SamplingParams,
    *,
    choice_index: int,
    output_position: int = 0,
    suppressed: tuple[int, ...] = (),
    registration: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> pb.Sampling:
    """What the last stage is asked for a row; the last three as in `place_sampling`."""
    sampling = pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        bias_token_ids=[token for token, _ in params.logit_bias],
        bias_values=[value for _, value in params.logit_bias],
        num_logprobs=params.num_logprobs or 0,
        logprobs=params.num_logprobs is not None,
        seed=params.seed,
        choice_index=choice_index,
    )
    place_sampling(sampling, output_position=output_position, suppressed=suppressed, registration=registration)
    return sampling


def place_sampling(
    sampling: pb.Sampling,
    *,
    output_position: int,
    suppressed: Sequence[int] = (),
    registration: tuple[Sequence[int], Sequence[int]] | None = None,
) -> None:
    """Ask it for the token at `output_position`, which is none of `suppressed`; `registration` is (prompt, generated so far)."""
    sampling.output_position = output_position
    sampling.suppressed_token_ids.extend(suppressed)
    if registration is not None:
        prompt, output = (np.array(ids, dtype="<i4").tobytes() for ids in registration)
        sampling.registration.CopyFrom(pb.Registration(prompt_token_ids=prompt, output_token_ids=output))


def _logprobs(result: pb.RowResult, params: SamplingParams, token: int, raw_logit: float) -> TokenLogprobs | None:
    if params.num_logprobs is None:
        return None
    ids = np.frombuffer(result.top_ids, dtype="<i4").tolist()
    values = np.frombuffer(result.top_raw_logits, dtype="<f4").tolist()
    lse = result.raw_logsumexp
    return TokenLogprobs(token, raw_logit - lse, tuple((i, v - lse) for i, v in zip(ids, values, strict=True)))
