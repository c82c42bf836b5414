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
    """Ids (int64) and values [R, K] of the `size` highest. No NaN may be there; among -inf the order is open.

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
    values_RK, ids_RK = torch.topk(x_RV, min(size + 1, x_RV.shape[-1]))
    equal_RK = (values_RK[:, 1:] == values_RK[:, :-1]) & (values_RK[:, 1:] > -torch.inf)
    if not equal_RK.any():
        return ids_RK[:, :size], values_RK[:, :size]
    if values_RK.shape[1] > size:
        cut = torch.nonzero(equal_RK[:, -1]).flatten()  # rows whose last place several values share
        if len(cut):
            ids_RK[cut, :size] = _lowest_ids(x_RV[cut], values_RK[cut, size - 1 : size], size)
    ids_RK = ids_RK[:, :size].sort(dim=-1).values
    values_RK, order_RK = x_RV.gather(1, ids_RK).sort(dim=-1, descending=True, stable=True)
    return ids_RK.gather(1, order_RK), values_RK


def _lowest_ids(x_RV: Tensor, last_R1: Tensor, size: int) -> Tensor:
    """Ids of all values above the last that is taken, and of as many equal to it as fit, lowest ids first."""
    above_RV, equal_RV = x_RV > last_R1, x_RV == last_R1
    room_R1 = size - above_RV.sum(dim=-1, keepdim=True)
    taken_RV = above_RV | (equal_RV & (equal_RV.cumsum(dim=-1, dtype=torch.int32) <= room_R1))
    return torch.nonzero(taken_RV)[:, 1].view(len(x_RV), size)
