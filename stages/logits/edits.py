"""Mask, bias and penalties, in that order, on rows of logits in place. R rows, V vocabulary, N edited entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.logits.history import PenaltyHistory

Row = tuple[int, NDArray[np.int32], int, pb.Sampling]  # sequence id, the row's tokens, context length, what was asked


def has_penalties(sampling: pb.Sampling) -> bool:
    """Whether the row needs its sequence's history. An unset repetition penalty (0) is off."""
    return bool(sampling.repetition_penalty not in (0, 1) or sampling.frequency_penalty or sampling.presence_penalty)


def is_edited(sampling: pb.Sampling) -> bool:
    """Whether anything but the temperature changes the row."""
    return bool(
        sampling.suppressed_token_ids
        or sampling.bias_token_ids
        or sampling.allowed_token_bitmask
        or has_penalties(sampling)
    )


def edit(x_RV: Tensor, rows: Sequence[Row], history: PenaltyHistory) -> None:
    """Apply what the rows ask for. Raises what PenaltyHistory.update raises."""
    for index, (sequence_id, token_ids, context_len, sampling) in enumerate(rows):
        if has_penalties(sampling):
            history.update(sequence_id, token_ids, context_len, sampling)
        if sampling.allowed_token_bitmask:
            bits = np.frombuffer(sampling.allowed_token_bitmask, dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: x_RV.shape[1]].astype(bool)
            x_RV[index].masked_fill_(~torch.from_numpy(allowed).to(x_RV.device), -torch.inf)
    samplings = [row[3] for row in rows]
    at_N = _places(x_RV, [sampling.suppressed_token_ids for sampling in samplings])
    if at_N is not None:
        x_RV.view(-1)[at_N] = -torch.inf
    at_N = _places(x_RV, [sampling.bias_token_ids for sampling in samplings])
    if at_N is not None:
        x_RV.view(-1).index_add_(0, at_N, _put(x_RV, [np.array(s.bias_values, dtype=np.float32) for s in samplings]))
    _repeat(x_RV, rows, history)
    _subtract(x_RV, rows, history)


def _repeat(x_RV: Tensor, rows: Sequence[Row], history: PenaltyHistory) -> None:
    """Repetition: Keskar et al., 2019, as in transformers: away from the sign, for tokens of prompt and answer."""
    factors = [sampling.repetition_penalty or 1.0 for *_, sampling in rows]
    ids = [history.seen(row[0]) if factor != 1 else () for row, factor in zip(rows, factors, strict=True)]
    at_N = _places(x_RV, ids)
    if at_N is None:
        return
    factor_N = _put(x_RV, [np.full(len(i), f, dtype=np.float32) for i, f in zip(ids, factors, strict=True)])
    value_N = x_RV.view(-1)[at_N]
    x_RV.view(-1)[at_N] = torch.where(value_N < 0, value_N * factor_N, value_N / factor_N)


def _subtract(x_RV: Tensor, rows: Sequence[Row], history: PenaltyHistory) -> None:
    """Frequency and presence, for tokens of the answer."""
    ids: list[Any] = []
    amounts = []
    for sequence_id, _, _, sampling in rows:
        if sampling.frequency_penalty or sampling.presence_penalty:
            output, counts = history.counts(sequence_id)
            ids.append(output)
            amounts.append(counts * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty))
        else:
            ids.append(())
    at_N = _places(x_RV, ids)
    if at_N is not None:
        x_RV.view(-1)[at_N] -= _put(x_RV, amounts)


def _places(x_RV: Tensor, ids: Sequence[Sequence[int] | NDArray[np.int64]]) -> Tensor | None:
    """Places of each row's ids in the flattened rows; None where no row has any."""
    if not any(len(row) for row in ids):
        return None
    width = x_RV.shape[1]
    parts = [np.asarray(row, dtype=np.int64) + index * width for index, row in enumerate(ids) if len(row)]
    return torch.from_numpy(np.concatenate(parts)).to(x_RV.device)


def _put(x_RV: Tensor, parts: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(x_RV.device)
