"""What the last stage answered about known tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gateway.types import TokenLogprobs
from stageline.errors import InternalError
from stageline.stage.v1 import stage_service_pb2 as pb


def scored_tokens(
    result: pb.RowResult, target_ids: Sequence[int], alternative_ids: Sequence[int] = ()
) -> list[TokenLogprobs]:
    """One entry a target, then one for each token that could stand in place of the first.

    Raises InternalError: NON_FINITE_LOGITS, or RESULT_MISSING where the answer does not fit the question.
    """
    if result.non_finite:
        raise InternalError("NON_FINITE_LOGITS", "the model's logits held no finite value to score with")
    scores, count = result.scores, len(target_ids)
    top_ids = np.frombuffer(scores.top_ids, dtype="<i4")
    lengths = {len(scores.logprobs), len(scores.ranks)}
    if (
        lengths != {4 * (count + len(alternative_ids))}
        or len(scores.top_ids) != len(scores.top_logprobs)
        or len(top_ids) % count
    ):
        raise InternalError("RESULT_MISSING", f"the last stage did not answer for all {count} tokens to score")
    logprobs = np.frombuffer(scores.logprobs, dtype="<f4").tolist()
    ranks = np.frombuffer(scores.ranks, dtype="<i4").tolist()
    ids = top_ids.reshape(count, -1).tolist()
    values = np.frombuffer(scores.top_logprobs, dtype="<f4").reshape(count, -1).tolist()
    tops = [tuple(zip(*both, strict=True)) for both in zip(ids, values, strict=True)]
    tops += tops[:1] * len(alternative_ids)
    everything = (*target_ids, *alternative_ids)
    return [TokenLogprobs(*entry) for entry in zip(everything, logprobs, tops, ranks, strict=True)]
