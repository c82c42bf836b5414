"""Processes rows of logits where they are, and returns what an exact choice needs. R rows, V vocabulary, K candidates.

The order is mask, bias, penalties (repetition, then frequency and presence), temperature, all in float32. The kept set is
a prefix of the tokens sorted by (logit descending, id ascending): top-k, then top-p within it, then min-p relative to the
highest. Where it reaches beyond the candidates, one token of the rest is drawn here, by the counter-based generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.logits.history import PenaltyHistory
from stages.rng import STREAM_TAIL, uniform

BASE_CANDIDATES = 64
MAX_CANDIDATES = 4096

Row = tuple[int, NDArray[np.int32], int, pb.Sampling]  # sequence id, the row's tokens, context length, what was asked


class LogitsProcessor:
    """Keeps penalty histories; everything else is a function of the row."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._history = PenaltyHistory()

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget the histories of sequences that ended."""
        self._history.release(sequence_ids)

    def reset(self) -> None:
        """A new epoch: histories are registered again."""
        self._history.reset()

    def process(self, logits_RV: Tensor, rows: Sequence[Row]) -> list[pb.RowResult]:
        """One result a row of float32 logits [R, V]. The logits are changed in place."""
        if not rows:
            return []
        # The maximum is NaN or +inf where any member is, and -inf where no member is finite.
        finite_R = torch.isfinite(logits_RV.amax(dim=-1)).tolist()
        raw_lse_R = torch.logsumexp(logits_RV, dim=-1).tolist()
        plain = all(_is_plain_greedy(row[3]) for row in rows)
        best_R = _argmax(logits_RV) if plain else None
        results = []
        for index, (sequence_id, token_ids, context_len, sampling) in enumerate(rows):
            result = pb.RowResult(sequence_id=sequence_id, raw_logsumexp=raw_lse_R[index])
            results.append(result)
            if not finite_R[index]:
                result.non_finite = True
                continue
            raw_V = logits_RV[index]
            if sampling.num_logprobs:
                top_ids, top_logits = top(raw_V, min(sampling.num_logprobs, self._vocab_size))
                result.top_ids, result.top_raw_logits = _ids(top_ids), _floats(top_logits)
            if best_R is not None:
                value = raw_V[best_R[index]]
                result.processed_logsumexp = raw_lse_R[index]
                result.candidate_ids = np.array([best_R[index]], dtype="<i4").tobytes()
                result.candidate_logits = result.candidate_raw_logits = _floats(value[None])
                continue
            processed_V = self._processed(raw_V, sequence_id, token_ids, context_len, sampling)
            self._candidates(result, raw_V, processed_V, sampling)
        return results

    def _processed(
        self, raw_V: Tensor, sequence_id: int, token_ids: NDArray[np.int32], context_len: int, sampling: pb.Sampling
    ) -> Tensor:
        """The row after mask, bias, penalties and temperature."""
        x_V = raw_V.clone()
        if sampling.allowed_token_bitmask:
            bits = np.frombuffer(sampling.allowed_token_bitmask, dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
            x_V[~torch.from_numpy(allowed).to(x_V.device)] = -math.inf
        if sampling.suppressed_token_ids:
            x_V[self._put(sampling.suppressed_token_ids, torch.int64)] = -math.inf
        if sampling.bias_token_ids:
            x_V.index_add_(
                0, self._put(sampling.bias_token_ids, torch.int64), self._put(sampling.bias_values, torch.float32)
            )
        if has_penalties(sampling):
            self._history.update(sequence_id, token_ids, context_len, sampling)
            self._penalize(x_V, sequence_id, sampling)
        if sampling.temperature > 0:
            x_V /= sampling.temperature
        return x_V

    def _penalize(self, x_V: Tensor, sequence_id: int, sampling: pb.Sampling) -> None:
        if sampling.repetition_penalty != 1:  # Keskar et al., 2019, as in transformers: away from the sign
            seen = torch.from_numpy(self._history.seen(sequence_id)).to(x_V.device)
            value = x_V[seen]
            factor = sampling.repetition_penalty
            x_V[seen] = torch.where(value < 0, value * factor, value / factor)
        if sampling.frequency_penalty or sampling.presence_penalty:
            ids, counts = (torch.from_numpy(a).to(x_V.device) for a in self._history.counts(sequence_id))
            x_V[ids] -= counts * sampling.frequency_penalty + sampling.presence_penalty

    def _candidates(self, result: pb.RowResult, raw_V: Tensor, x_V: Tensor, sampling: pb.Sampling) -> None:
        lse = float(torch.logsumexp(x_V, dim=-1))
        if lse == -math.inf:  # everything is masked: nothing can be chosen
            result.non_finite = True
            return
        result.processed_logsumexp = lse
        size = min(self._num_candidates(sampling), self._vocab_size)
        ids_K, logits_K = top(x_V, size)
        if sampling.temperature > 0 and size < MAX_CANDIDATES and not _cut_inside(logits_K, lse, sampling):
            wide = min(MAX_CANDIDATES, self._vocab_size)
            if sampling.top_k:
                wide = min(wide, sampling.top_k)
            if wide > size and (sampling.top_p < 1 or sampling.min_p > 0):
                ids_K, logits_K = top(x_V, wide)
        result.candidate_ids, result.candidate_logits = _ids(ids_K), _floats(logits_K)
        result.candidate_raw_logits = _floats(raw_V[ids_K])
        if sampling.temperature > 0 and len(ids_K) < self._vocab_size and not _cut_inside(logits_K, lse, sampling):
            self._tail(result, raw_V, x_V, len(ids_K), sampling)

    def _num_candidates(self, sampling: pb.Sampling) -> int:
        if sampling.temperature == 0:
            return 1
        return min(sampling.top_k, MAX_CANDIDATES) if sampling.top_k else BASE_CANDIDATES

    def _tail(self, result: pb.RowResult, raw_V: Tensor, x_V: Tensor, skip: int, sampling: pb.Sampling) -> None:
        """Draw one token of the kept set beyond the first `skip` tokens, by inverse CDF in sorted order."""
        order = torch.sort(x_V, descending=True, stable=True).indices  # stable: equal logits by ascending id
        sorted_V = x_V[order].double()
        kept = num_kept(sorted_V, sampling)
        if kept <= skip:
            return
        result.tail.kept_logsumexp = float(torch.logsumexp(sorted_V[:kept], dim=-1))
        mass = torch.exp(sorted_V[skip:kept] - sorted_V[skip])
        total = mass.cumsum(0)
        draw = uniform(sampling.seed, sampling.choice_index, sampling.output_position, STREAM_TAIL) * float(total[-1])
        place = skip + min(int(torch.searchsorted(total, draw, right=True)), kept - skip - 1)
        token = int(order[place])
        result.tail.token_id, result.tail.raw_logit = token, float(raw_V[token])

    def _put(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self._device)


def has_penalties(sampling: pb.Sampling) -> bool:
    """Whether the row needs its sequence's history. An unset repetition penalty (0) is off."""
    return bool(sampling.repetition_penalty not in (0, 1) or sampling.frequency_penalty or sampling.presence_penalty)


def num_kept(sorted_V: Tensor, sampling: pb.Sampling) -> int:
    """Size of the kept set, given all processed logits in descending order (float64)."""
    kept = int(torch.isfinite(sorted_V).sum())
    if sampling.top_k:
        kept = min(kept, sampling.top_k)
    if sampling.top_p < 1:
        mass = torch.softmax(sorted_V[:kept], dim=-1)
        before = mass.cumsum(0) - mass
        kept = max(1, int((before < sampling.top_p).sum()))
    if sampling.min_p > 0:
        kept = max(1, int((sorted_V[:kept] >= sorted_V[0] + math.log(sampling.min_p)).sum()))
    return kept


def top(x_V: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the `size` highest, by (value descending, id ascending); torch.topk leaves ties open."""
    if size == 1:
        index = _argmax(x_V[None])
        ids = torch.tensor(index, device=x_V.device)
        return ids, x_V[ids]
    threshold = torch.topk(x_V, size).values[-1]
    above = torch.nonzero(x_V > threshold).flatten()
    equal = torch.nonzero(x_V == threshold).flatten()[: size - len(above)]
    ids = torch.cat((above, equal))
    ids = ids[torch.argsort(ids)]
    ids = ids[torch.sort(x_V[ids], descending=True, stable=True).indices]
    return ids, x_V[ids]


def _argmax(x_RV: Tensor) -> list[int]:
    """The lowest id among the highest values of each row."""
    best_R1 = x_RV.amax(dim=-1, keepdim=True)
    return (x_RV == best_R1).int().argmax(dim=-1).tolist()


def _cut_inside(logits_K: Tensor, lse: float, sampling: pb.Sampling) -> bool:
    """Whether the kept set ends within the candidates, whatever comes after them."""
    size = len(logits_K)
    if not math.isfinite(float(logits_K[-1])):
        return True
    if sampling.top_k and sampling.top_k <= size:
        return True
    if sampling.min_p > 0 and float(logits_K[-1]) < float(logits_K[0]) + math.log(sampling.min_p):
        return True
    if sampling.top_p < 1 and not sampling.top_k:
        mass = torch.exp(logits_K.double() - lse)
        return float(mass.sum()) - float(mass[-1]) >= sampling.top_p
    return False


def _is_plain_greedy(sampling: pb.Sampling) -> bool:
    return not (
        sampling.temperature
        or sampling.suppressed_token_ids
        or sampling.bias_token_ids
        or sampling.allowed_token_bitmask
        or has_penalties(sampling)
    )


def _ids(ids: Tensor) -> bytes:
    return ids.cpu().numpy().astype("<i4").tobytes()


def _floats(values: Tensor) -> bytes:
    return values.float().cpu().numpy().astype("<f4").tobytes()
