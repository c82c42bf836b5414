"""Where the kept set ends. R rows, V vocabulary, K candidates, by (logit descending, id ascending).

Logits are relative to the highest. Masses are float64 sums in sorted order, so that the gateway, which cuts again by the
same rule, comes to the same end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.logits.top import top
from stages.rng import STREAM_TAIL, uniform

MAX_CANDIDATES = 4096
OFF = 1 << 62  # a top-k that no row reaches
MARGIN = 1e-9  # candidates sent beyond the nucleus: the gateway's sums may differ in the last bits


@dataclass(frozen=True, slots=True)
class Cuts:
    """The parameters of R rows: top-k (OFF: off), top-p (2: off), log of min-p (-inf: off)."""

    top_k_R1: Tensor
    top_p_R1: Tensor
    log_min_p_R1: Tensor

    @classmethod
    def of(cls, samplings: Sequence[pb.Sampling], vocab_size: int, device: torch.device) -> Cuts:
        """From what the rows ask."""
        return cls(
            torch.tensor([[top_k(s, vocab_size) or OFF] for s in samplings], device=device),
            torch.tensor([[s.top_p if s.top_p < 1 else 2.0] for s in samplings], dtype=torch.float64, device=device),
            torch.tensor([[log_min_p(s)] for s in samplings], dtype=torch.float64, device=device),
        )


def log_min_p(sampling: pb.Sampling) -> float:
    """Lowest kept logit relative to the highest."""
    return math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf


def top_k(sampling: pb.Sampling, vocab_size: int) -> int:
    """How many tokens top-k keeps; 0 where that is all of them."""
    return sampling.top_k if sampling.top_k < vocab_size else 0


def cut(values_RK: Tensor, lse_R: Tensor, cuts: Cuts, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp of what top-k keeps [R] float32, candidates to send [R], whether the kept set ends there [R]).

    The log-sum-exp is right where top-k is off or within the candidates; beyond, the row is not inside.
    """
    x_RK = values_RK.double()
    size = x_RK.shape[1]
    column_K = torch.arange(size, device=x_RK.device)
    in_top_k_RK = column_K < cuts.top_k_R1
    sums_RK = torch.where(in_top_k_RK, x_RK.exp(), 0.0).cumsum(dim=-1)
    by_top_k_R = cuts.top_k_R1.squeeze(1) <= size
    lse_R = torch.where(by_top_k_R, sums_RK[:, -1].log().float(), lse_R)
    before_RK = (sums_RK - x_RK.exp()) * torch.exp(-lse_R.double())[:, None]
    in_nucleus_RK = (before_RK < cuts.top_p_R1 + MARGIN) & in_top_k_RK
    kept_RK = in_nucleus_RK & (x_RK >= cuts.log_min_p_R1) & torch.isfinite(x_RK)
    num_R = kept_RK.sum(dim=-1).clamp(min=1)
    # A top-k beyond the candidates changes what the nucleus is measured over: only the end of the finite logits,
    # or a cut that measures nothing, can then be inside.
    measurable_R = by_top_k_R | (cuts.top_k_R1.squeeze(1) == OFF) | (cuts.top_p_R1.squeeze(1) > 1)
    ended_R = ~torch.isfinite(x_RK[:, -1]) | (size == vocab_size)
    inside_R = ended_R | by_top_k_R | (measurable_R & (num_R < size))
    return lse_R, num_R, inside_R


def num_kept(sorted_V: Tensor, lse: float, sampling: pb.Sampling) -> int:
    """Size of the kept set, given the processed logits that top-k keeps in descending order (float64)."""
    kept = int(torch.isfinite(sorted_V).sum())
    if sampling.top_p < 1:
        mass_V = torch.exp(sorted_V[:kept] - lse)
        kept = max(1, int((mass_V.cumsum(0) - mass_V < sampling.top_p).sum()))
    if sampling.min_p > 0:
        kept = max(1, int((sorted_V[:kept] - sorted_V[0] >= math.log(sampling.min_p)).sum()))
    return kept


def wide(result: pb.RowResult, raw_V: Tensor, x_V: Tensor, lse: Tensor, sampling: pb.Sampling) -> None:
    """A row whose top-k or nucleus reaches beyond the most candidates: more and more of it is sorted until it ends."""
    vocab_size = len(x_V)
    limit = top_k(sampling, vocab_size) or vocab_size
    size = limit if limit < vocab_size else min(8 * MAX_CANDIDATES, vocab_size)
    while True:
        ids_K, values_K = (t[0] for t in top(x_V[None], size))
        sorted_K = values_K.double()
        if limit < vocab_size:
            lse = sorted_K.exp().cumsum(0)[-1].log().float()
        kept = num_kept(sorted_K, float(lse), sampling)
        if kept < size or size == limit:
            break
        size = limit
    sent = min(kept + 1, size, MAX_CANDIDATES)
    result.processed_logsumexp = float(lse)
    result.candidate_ids = ids_K[:sent].int().cpu().numpy().tobytes()
    result.candidate_logits = values_K[:sent].cpu().numpy().tobytes()
    result.candidate_raw_logits = raw_V[ids_K[:sent]].cpu().numpy().tobytes()
    if kept <= sent:
        return
    cdf = sorted_K[:kept].exp().cumsum(0)
    beyond = cdf[sent:] - cdf[sent - 1]
    number = uniform(sampling.seed, sampling.choice_index, sampling.output_position, STREAM_TAIL)
    place = sent + min(int(torch.searchsorted(beyond, number * float(beyond[-1]), right=True)), kept - sent - 1)
    token = int(ids_K[place])
    result.tail.kept_logsumexp = math.log(float(cdf[-1]))
    result.tail.token_id, result.tail.raw_logit = token, float(raw_V[token])
