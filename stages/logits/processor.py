"""Processes rows of logits where they are, and returns what an exact choice needs. R rows, V vocabulary, K candidates.

The order is mask, bias, penalties (repetition, then frequency and presence), temperature, all in float32. The kept set is
a prefix of the tokens sorted by (logit descending, id ascending): top-k, then top-p within it, then min-p relative to the
highest. Where it reaches beyond the candidates, one token of the rest is drawn here, by the counter-based generator.

Each row gets as many candidates as its cut needs: 64, then 512, then 4,096. Every operation treats a row by itself, in an
order that does not depend on its neighbours, so a row's result is the same bits in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.logits.edits import Row, edit, is_edited
from stages.logits.history import PenaltyHistory
from stages.logits.mass import draw, logsumexp, mass, new_weights, weights
from stages.logits.nucleus import MAX_CANDIDATES, Cuts, cut, top_k, wide
from stages.logits.top import first_maximum, top
from stages.logits.transfer import fetch
from stages.rng import STREAM_TAIL, uniforms

LEVELS = (64, 512, MAX_CANDIDATES)
ROWS_AT_ONCE = 16  # bounds the copies: a few times 16 rows of float32


class LogitsProcessor:
    """Keeps penalty histories; everything else is a function of the row."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._history = PenaltyHistory()
        self._x_RV = torch.empty(ROWS_AT_ONCE, vocab_size, device=device)
        self._weights_RCL = new_weights(ROWS_AT_ONCE, vocab_size, device)

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget the histories of sequences that ended."""
        self._history.release(sequence_ids)

    def reset(self) -> None:
        """A new epoch: histories are registered again."""
        self._history.reset()

    def process(self, logits_RV: Tensor, rows: Sequence[Row]) -> list[pb.RowResult]:
        """One result a row of float32 logits [R, V].

        Raises what PenaltyHistory.update raises.
        """
        results = [pb.RowResult(sequence_id=row[0]) for row in rows]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            self._process(logits_RV[part], rows[part], results[part])
        return results

    def _process(self, raw_RV: Tensor, rows: Sequence[Row], results: Sequence[pb.RowResult]) -> None:
        best_R, ids_R = first_maximum(raw_RV)
        highest, best_ids = fetch(best_R, ids_R)
        # The maximum is NaN or +inf where any member is, and -inf where no member is finite.
        finite = np.isfinite(highest).tolist()
        asked, others = [], []
        for index, (*_, sampling) in enumerate(rows):
            if not finite[index]:
                results[index].non_finite = True
                continue
            if sampling.logprobs:
                asked.append(index)
            if sampling.temperature > 0 or is_edited(sampling):
                others.append(index)
            else:
                _answer_greedy(results[index], best_ids[index], highest[index])
        if asked:
            self._logprobs(pick(raw_RV, asked), best_R[asked], [rows[i] for i in asked], [results[i] for i in asked])
        if others:
            self._choose(raw_RV, others, rows, results)

    def _logprobs(self, raw_RV: Tensor, best_R: Tensor, rows: Sequence[Row], results: Sequence[pb.RowResult]) -> None:
        """The raw log-sum-exp and the highest raw logits."""
        numbers = [min(row[3].num_logprobs, self._vocab_size) for row in rows]
        lse_R = logsumexp(raw_RV, best_R, self._weights_RCL)
        ids_RK, values_RK = top(raw_RV, max(1, *numbers))
        lse, ids, values = fetch(lse_R, ids_RK, values_RK)
        for index, number in enumerate(numbers):
            results[index].raw_logsumexp = lse[index]
            results[index].top_ids = ids[index, :number].tobytes()
            results[index].top_raw_logits = values[index, :number].tobytes()

    def _choose(
        self, raw_RV: Tensor, places: list[int], all_rows: Sequence[Row], all_results: Sequence[pb.RowResult]
    ) -> None:
        """Rows that are edited or drawn; `places` are theirs in raw_RV."""
        rows, results = [all_rows[i] for i in places], [all_results[i] for i in places]
        at_R = torch.tensor(places, device=self._device)
        x_RV = torch.index_select(
            raw_RV, 0, at_R, out=self._x_RV[: len(places)]
        )  # a copy: raw logits of the candidates are wanted too
        if any(is_edited(row[3]) for row in rows):
            edit(x_RV, rows, self._history)
        best_R, ids_R = first_maximum(x_RV)
        highest, best_ids, raw = fetch(best_R, ids_R, raw_RV[at_R, ids_R])
        drawn = []
        for index, row in enumerate(rows):
            if not math.isfinite(highest[index]):  # everything is masked, or a penalty overflowed: nothing to choose
                results[index].non_finite = True
            elif row[3].temperature > 0:
                drawn.append(index)
            else:
                _answer_greedy(results[index], best_ids[index], raw[index])
        if drawn:
            x_RV = pick(x_RV, drawn)
            x_RV -= best_R[drawn, None]  # before the division, which a small temperature would make infinite
            x_RV /= self._put([rows[i][3].temperature for i in drawn], torch.float32)[:, None]
            weights_RCL = weights(x_RV, self._weights_RCL)
            samplings, answers = [rows[i][3] for i in drawn], [results[i] for i in drawn]
            _Draws(raw_RV, at_R[drawn], x_RV, weights_RCL, samplings, answers).answer()

    def _put(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self._device)


class _Draws:
    """Rows with a temperature: processed logits [R, V] relative to each row's highest, which stands at 0."""

    def __init__(
        self,
        raw_RV: Tensor,
        at_R: Tensor,
        x_RV: Tensor,
        weights_RCL: Tensor,
        samplings: Sequence[pb.Sampling],
        results: Sequence[pb.RowResult],
    ) -> None:
        self._raw_RV, self._at_R, self._x_RV = raw_RV, at_R, x_RV
        self._samplings, self._results = samplings, results
        self._weights_RCL = weights_RCL
        self._lse_R = mass(weights_RCL).log().float()

    def answer(self) -> None:
        """Fill the results: candidates at the lowest level that holds the cut, and draws from the tails."""
        levels = [_first_level(top_k(sampling, self._x_RV.shape[1])) for sampling in self._samplings]
        for level in LEVELS:
            now = [index for index, first in enumerate(levels) if first == level]
            for index in self._answer_level(level, now) if now else ():
                levels[index] = LEVELS[LEVELS.index(level) + 1]

    def _answer_level(self, level: int, now: list[int]) -> list[int]:
        """Answer the rows whose cut lies within `level` candidates, or that need no more; the others are returned."""
        samplings, vocab_size = [self._samplings[i] for i in now], self._x_RV.shape[1]
        ids_RK, values_RK = top(pick(self._x_RV, now), min(level, vocab_size))
        cuts = Cuts.of(samplings, vocab_size, ids_RK.device)
        lse_R, num_R, inside_R = cut(values_RK, self._lse_R[now], cuts, vocab_size)
        raw_RK = self._raw_RV[self._at_R[now][:, None], ids_RK]
        lse, nums, inside, ids, values, raw = fetch(lse_R, num_R, inside_R, ids_RK, values_RK, raw_RK)
        later, tails = [], []
        for place, index in enumerate(now):
            sampling, result, num = samplings[place], self._results[index], int(nums[place])
            if not inside[place]:
                sorted_cut = top_k(sampling, vocab_size) or sampling.top_p < 1
                if level < MAX_CANDIDATES and (sorted_cut or sampling.min_p > 0):
                    later.append(index)
                    continue
                if sorted_cut:
                    wide(result, self._raw_RV[self._at_R[index]], self._x_RV[index], self._lse_R[index], sampling)
                    continue
            result.processed_logsumexp = lse[place]
            result.candidate_ids = ids[place, :num].tobytes()
            result.candidate_logits = values[place, :num].tobytes()
            result.candidate_raw_logits = raw[place, :num].tobytes()
            if not inside[place]:
                tails.append(place)
        if tails:
            self._draw_tails([now[place] for place in tails], ids_RK[tails], values_RK[tails])
        return later

    def _draw_tails(self, rows: list[int], ids_RK: Tensor, values_RK: Tensor) -> None:
        """One draw a row from what lies beyond its candidates, down to min-p; no other cut is there."""
        samplings = [self._samplings[i] for i in rows]
        w_RV = self._weights_RCL.flatten(1)  # a view; each row's weights are used once
        w_RV[torch.tensor(rows, device=w_RV.device)[:, None], ids_RK] = 0.0
        for index, sampling in zip(rows, samplings, strict=True):
            if sampling.min_p > 0:
                x_V = self._x_RV[index]
                w_RV[index, : len(x_V)].masked_fill_(x_V < lowest_kept(sampling.min_p), 0.0)
        w_RCL = pick(self._weights_RCL, rows)
        tail_R = mass(w_RCL)
        kept_lse_R = (tail_R + values_RK.double().exp().cumsum(dim=-1)[:, -1]).log().float()
        numbers = uniforms(
            [s.seed for s in samplings], [s.choice_index for s in samplings], [s.output_position for s in samplings],
            STREAM_TAIL,
        )  # fmt: skip
        drawn_R = draw(w_RCL, torch.from_numpy(numbers).to(w_RCL.device))
        raw_R = self._raw_RV[self._at_R[rows], drawn_R]
        masses, kept_lse, drawn, raw = fetch(tail_R.float(), kept_lse_R, drawn_R, raw_R)
        for place, index in enumerate(rows):
            if masses[place] > 0:
                tail = self._results[index].tail
                tail.kept_logsumexp, tail.token_id, tail.raw_logit = kept_lse[place], drawn[place], raw[place]


def pick(x_RV: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows: the tensor itself where they are all of it, else a copy."""
    if len(rows) == len(x_RV):
        return x_RV
    return x_RV.index_select(0, torch.tensor(rows, device=x_RV.device))


def lowest_kept(min_p: float) -> float:
    """The lowest float32 logit, relative to the highest, that min-p keeps: x >= log(min_p) in exact arithmetic."""
    value = np.float32(math.log(min_p))
    return float(value if float(value) >= math.log(min_p) else np.nextafter(value, np.float32(np.inf)))


def _first_level(kept: int) -> int:
    return next((level for level in LEVELS if kept <= level), MAX_CANDIDATES)


def _answer_greedy(result: pb.RowResult, token_id: int, raw_logit: float) -> None:
    result.candidate_ids = np.array([token_id], dtype="<i4").tobytes()
    result.candidate_logits = np.zeros(1, dtype="<f4").tobytes()
    result.candidate_raw_logits = np.array([raw_logit], dtype="<f4").tobytes()
