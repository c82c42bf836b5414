"""The highest values of each row, by (value descending, id ascending). R rows, V vocabulary, C chunks of L tokens, K kept.

torch.topk leaves open which of equal values it takes, and equal values are common: bfloat16 products have 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32  # tokens of a chunk: their maxima are read at the speed of memory, and few chunks hold the top


def first_maximum(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value of each row and the lowest id that has it; the value is NaN where the row holds one."""
    chunks_RCL = _chunks(x_RV)
    if chunks_RCL is None:
        values_R, ids_R = x_RV.max(dim=-1)
        return values_R, ids_R
    values_R, chunk_R = chunks_RCL.amax(dim=-1).max(dim=-1)  # torch.max names the first of equal values
    best_RL = chunks_RCL[torch.arange(len(x_RV), device=x_RV.device), chunk_R]
    return values_R, chunk_R * CHUNK + best_RL.max(dim=-1).indices


def top(x_RV: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ids (int64) and values [R, K] of the `size` highest. No NaN may be there.

    The K highest lie in the K chunks with the highest maxima (ties to the lower chunk): each of those has a member that
    comes before every member of the others.
    """
    chunks_RCL = _chunks(x_RV)
    if chunks_RCL is None or 4 * size * CHUNK > x_RV.shape[-1]:
        return _top(x_RV, size)
    chosen_RK = _top(chunks_RCL.amax(dim=-1), size)[0].sort(dim=-1).values  # ascending, so that places go up with ids
    members_RM = chunks_RCL.gather(1, chosen_RK[:, :, None].expand(-1, -1, CHUNK)).flatten(1)
    places_RK, values_RK = _top(members_RM, size)
    return chosen_RK.gather(1, places_RK // CHUNK) * CHUNK + places_RK % CHUNK, values_RK


def _chunks(x_RV: Tensor) -> Tensor | None:
    return x_RV.unflatten(1, (-1, CHUNK)) if x_RV.shape[-1] % CHUNK == 0 and x_RV.is_contiguous() else None


def _top(x_RV: Tensor, size: int) -> tuple[Tensor, Tensor]:
    last = x_RV.shape[-1] - 1
    ids_RK = last - (torch.topk(_keys(x_RV), size).values & 0xFFFFFFFF)
    return ids_RK, x_RV.gather(1, ids_RK)


def _keys(x_RV: Tensor) -> Tensor:
    """int64 keys in the order of (value, then lower id): all different, so that their top is one and only."""
    bits_RV = (x_RV + 0.0).view(torch.int32)  # -0.0 becomes 0.0: they are equal
    bits_RV ^= (bits_RV >> 31) & 0x7FFFFFFF  # below zero, the order of float bits is reversed
    return (bits_RV.long() << 32) | torch.arange(x_RV.shape[-1] - 1, -1, -1, device=x_RV.device)
