"""Sums of exponentials over rows, and draws from them by index. R rows, V vocabulary, C chunks of L tokens.

Summed in fixed chunks: torch splits the sum of a single long row over its threads, so a row's bits would depend on how
many rows stand beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 512


def new_weights(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """Zeros [R, C, L] float32 to be filled again and again: fresh memory costs more than the sums themselves."""
    return torch.zeros(num_rows, -(-vocab_size // CHUNK), CHUNK, device=device)


def weights(x_RV: Tensor, out_RCL: Tensor) -> Tensor:
    """exp(x) as [R, C, L] float32 within `out_RCL`, zero beyond the vocabulary. x must not exceed 0 by much."""
    w_RCL = out_RCL[: len(x_RV)]
    torch.exp(x_RV, out=w_RCL.flatten(1)[:, : x_RV.shape[1]])
    return w_RCL


def mass(w_RCL: Tensor) -> Tensor:
    """The sum of each row, [R] float64: float32 within a chunk, float64 over the chunks."""
    return w_RCL.sum(dim=-1).double().cumsum(dim=-1)[:, -1]


def logsumexp(x_RV: Tensor, highest_R: Tensor, out_RCL: Tensor) -> Tensor:
    """log(sum(exp(x))) of each row, [R] float32, given its (finite) maximum; `out_RCL` is written over."""
    w_RCL = out_RCL[: len(x_RV)]
    flat_RV = w_RCL.flatten(1)[:, : x_RV.shape[1]]
    torch.sub(x_RV, highest_R[:, None], out=flat_RV)
    flat_RV.exp_()
    return (mass(w_RCL).log() + highest_R).float()


def draw(w_RCL: Tensor, uniform_R: Tensor) -> Tensor:
    """One id a row, with probability proportional to its weight: inverse CDF in the order of ids, [R] int64.

    `uniform_R` is float64 in [0, 1). A row must hold a positive weight; an id of weight 0 is never drawn.
    """
    cdf_RC = w_RCL.sum(dim=-1).double().cumsum(dim=-1)
    target_R1 = uniform_R[:, None] * cdf_RC[:, -1:]
    chunk_R1 = _place(cdf_RC, target_R1)
    before_R1 = torch.where(chunk_R1 > 0, cdf_RC.gather(1, (chunk_R1 - 1).clamp(min=0)), 0.0)
    inner_RL = w_RCL.gather(1, chunk_R1[:, :, None].expand(-1, -1, CHUNK)).squeeze(1).double().cumsum(dim=-1)
    return (chunk_R1 * CHUNK + _place(inner_RL, target_R1 - before_R1)).squeeze(1)


def _place(cdf_RN: Tensor, target_R1: Tensor) -> Tensor:
    """The first place whose cumulated weight exceeds the target, at most the last place that adds any."""
    last_R1 = torch.searchsorted(cdf_RN, cdf_RN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cdf_RN, target_R1, right=True), last_R1)
