"""Log-probabilities of known tokens, from raw logits in float32. S scored tokens, V vocabulary, K top entries,
A alternatives of one token, B of them at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.logits.mass import logsumexp, new_weights
from stages.logits.top import top
from stages.logits.transfer import fetch

ROWS_AT_ONCE = 16  # bounds the copies, as in LogitsProcessor


class Scorer:
    """The scores of one step: `add` takes logits piece by piece, `results` cuts what came by row."""

    def __init__(
        self,
        target_ids: NDArray[np.int64],
        num_logprobs: int,
        device: torch.device,
        alternatives: Sequence[tuple[int, NDArray[np.int64]]] = (),
    ) -> None:
        """`target_ids` [S]; `num_logprobs` is the most that any row asks for; `alternatives`: places among the S, ascending, and
        other tokens that are scored there."""
        self._targets_S = torch.from_numpy(target_ids).to(device)
        self._num_logprobs, self._device = num_logprobs, device
        self._weights_RCL: Tensor | None = None
        self._pieces: list[list[NDArray[np.float32]]] = []
        self._alternatives = {place: torch.from_numpy(ids).to(device) for place, ids in alternatives}
        self._others: dict[int, list[list[NDArray[np.float32]]]] = {}

    def add(self, start: int, logits_SV: Tensor) -> None:
        """Raw logits of the scored tokens from place `start`; written over where they are not finite."""
        if self._weights_RCL is None:
            self._weights_RCL = new_weights(min(ROWS_AT_ONCE, len(self._targets_S)), logits_SV.shape[1], self._device)
        for first in range(0, len(logits_SV), ROWS_AT_ONCE):
            part_RV = logits_SV[first : first + ROWS_AT_ONCE]
            at = start + first
            self._pieces.append(self._score(part_RV, at, self._weights_RCL))

    def _score(self, x_RV: Tensor, at: int, weights_RCL: Tensor) -> list[NDArray[np.float32]]:
        targets_R = self._targets_S[at : at + len(x_RV)]
        chosen_R1 = x_RV.gather(1, targets_R[:, None])
        best_R = x_RV.amax(dim=-1)  # NaN or infinite where any member is
        finite_R = best_R.isfinite() & chosen_R1[:, 0].isfinite()
        x_RV.masked_fill_(~finite_R[:, None], 0.0)  # so that the order of the others is one
        lse_R = logsumexp(x_RV, x_RV.amax(dim=-1), weights_RCL)
        ranks_R = (x_RV > chosen_R1).sum(dim=-1) + 1
        for row in range(len(x_RV)):
            if (ids_A := self._alternatives.get(at + row)) is not None:
                self._others[at + row] = [
                    fetch(x_RV[row, ids_B] - lse_R[row], (x_RV[row] > x_RV[row, ids_B, None]).sum(dim=-1) + 1)
                    for ids_B in ids_A.split(ROWS_AT_ONCE)
                ]
        ids_RK, values_RK = top(x_RV, max(1, min(self._num_logprobs, x_RV.shape[1])))
        return fetch(chosen_R1[:, 0] - lse_R, ranks_R, finite_R, ids_RK, values_RK - lse_R[:, None])

    def results(self, rows: Sequence[tuple[int, int]]) -> list[pb.Scores | None]:
        """For rows of (number of targets, number of top entries), in order, their scores; None where logits were not
        finite."""
        logprobs, ranks, finite, ids, values = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        scores: list[pb.Scores | None] = []
        start = 0
        for count, number in rows:
            part, others = slice(start, start + count), self._others.get(start, [])
            start += count
            if not finite[part].all():
                scores.append(None)
                continue
            scores.append(
                pb.Scores(
                    logprobs=b"".join([logprobs[part].tobytes(), *(one.tobytes() for one, _ in others)]),
                    ranks=b"".join([ranks[part].tobytes(), *(one.tobytes() for _, one in others)]),
                    top_ids=ids[part, :number].tobytes(),
                    top_logprobs=values[part, :number].tobytes(),
                )
            )
        return scores
