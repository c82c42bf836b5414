"""The kept set of one row: top-k, then top-p within it, then min-p. Logits are relative to the row's highest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gateway.types import SamplingParams
from stageline.stage.v1 import stage_service_pb2 as pb


def kept_weights(result: pb.RowResult, params: SamplingParams) -> tuple[NDArray[np.float64], float]:
    """(cumulated weights of the kept candidates [K], the weight of the whole kept set).

    The last of them is the whole, unless a tail holds the rest.
    """
    logits = np.frombuffer(result.candidate_logits, dtype="<f4").astype(np.float64)
    logits = logits[np.isfinite(logits)]  # masked tokens stand last; rounding of the draw must never reach them
    if result.HasField("tail"):
        return np.cumsum(np.exp(logits - result.tail.kept_logsumexp)), 1.0
    if params.top_k:
        logits = logits[: params.top_k]
    if params.top_p < 1:
        mass = np.exp(logits - result.processed_logsumexp)
        logits = logits[: max(1, int((np.cumsum(mass) - mass < params.top_p).sum()))]
    if params.min_p > 0:
        logits = logits[: max(1, int((logits >= math.log(params.min_p)).sum()))]
    weights = np.cumsum(np.exp(logits))
    return weights, float(weights[-1])


def kept_probabilities(result: pb.RowResult, params: SamplingParams) -> NDArray[np.float64]:
    """Probability of each kept candidate, in order. They sum to 1, or to less where a tail has the rest."""
    weights, total = kept_weights(result, params)
    return np.diff(weights, prepend=0.0) / total


def places_in_matrix(
    results: Sequence[pb.RowResult], params: Sequence[SamplingParams], numbers: NDArray[np.float64]
) -> tuple[list[int], list[int]]:
    """(the place each random number falls on, the number of kept candidates), as `kept_weights` of each row has it.

    R rows in one [R, K] matrix, padded with -inf. Sums run in the same order as for a single row: the same bits.
    """
    lengths_R = np.array([len(result.candidate_logits) // 4 for result in results])
    column_K = np.arange(int(lengths_R.max()))
    there_RK = column_K < lengths_R[:, None]
    logits_RK = np.full(there_RK.shape, -np.inf)
    logits_RK[there_RK] = np.frombuffer(b"".join([result.candidate_logits for result in results]), dtype="<f4")
    tail_R = np.array([result.HasField("tail") for result in results])
    kept_R = np.isfinite(logits_RK).sum(axis=1)

    def cut(rows: list[int], kept_RK: NDArray[np.bool_]) -> None:
        kept_R[rows] = np.minimum(kept_R[rows], np.maximum(1, kept_RK.sum(axis=1)))

    whole = [i for i, has_tail in enumerate(tail_R.tolist()) if not has_tail]
    rows = [i for i in whole if params[i].top_k]
    if rows:
        kept_R[rows] = np.minimum(kept_R[rows], [params[i].top_k for i in rows])
    rows = [i for i in whole if params[i].top_p < 1]
    if rows:
        lse_R1 = np.array([[results[i].processed_logsumexp] for i in rows])
        mass_RK = np.exp(logits_RK[rows] - lse_R1)
        cut(rows, mass_RK.cumsum(axis=1) - mass_RK < np.array([[params[i].top_p] for i in rows]))
    rows = [i for i in whole if params[i].min_p > 0]
    if rows:
        cut(rows, logits_RK[rows] >= np.array([[math.log(params[i].min_p)] for i in rows]))
    offset_R1 = np.array([[r.tail.kept_logsumexp if t else 0.0] for r, t in zip(results, tail_R, strict=True)])
    weights_RK = np.exp(logits_RK - offset_R1).cumsum(axis=1)
    total_R = np.where(tail_R, 1.0, weights_RK[np.arange(len(results)), kept_R - 1])
    places_R = (weights_RK <= (numbers * total_R)[:, None]).sum(axis=1)
    return np.minimum(places_R, kept_R).tolist(), kept_R.tolist()
