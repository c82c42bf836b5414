"""What a micro-batch tells attention. T tokens, R rows, N query heads, K KV heads, H head size, B blocks, S slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.batch import StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionContext:
    """Rows of a micro-batch as tensors, and as Python numbers where shapes depend on them.

    The first `num_decode_rows` rows have one token each. `block_tables_RM` is padded with the row's own first
    block.
    """

    num_decode_rows: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    query_starts_R1: Tensor  # int32 [R + 1], cumulative
    context_lens_R: Tensor  # int32 [R]
    block_tables_RM: Tensor  # int32 [R, M]
    positions_T: Tensor  # int64 [T]
    slots_T: Tensor  # int64 [T]
    shared_blocks: tuple[int, ...] = ()
    """Leading blocks that a row has in common with the row before it, [R], 0 for decode rows; empty where fewer than two rows are longer."""
    # What a backend worked out for this step and uses again in every layer.
    per_step: dict[Any, Any] = field(default_factory=dict)

    @property
    def only_decodes(self) -> bool:
        """Whether no row has more than one token."""
        return self.num_decode_rows == len(self.query_lens)

    @classmethod
    def from_batch(cls, batch: StepBatch, arrays: Sequence[Tensor]) -> AttentionContext:
        """`arrays` are the batch's `attention_arrays`, on the device."""
        starts, lens, tables, positions, slots = arrays
        return cls(
            num_decode_rows=batch.num_decode_rows,
            query_lens=tuple(batch.query_lens.tolist()),
            context_lens=tuple(batch.context_lens.tolist()),
            query_starts_R1=starts,
            context_lens_R=lens,
            block_tables_RM=tables,
            positions_T=positions,
            slots_T=slots,
            shared_blocks=shared_blocks(batch),
        )


def shared_blocks(batch: StepBatch) -> tuple[int, ...]:
    """See `AttentionContext.shared_blocks`: prompts that begin alike, and continuations of one context, lie side by side."""
    tables_PM = batch.block_tables[batch.num_decode_rows :]
    if len(tables_PM) < 2:
        return ()  # most steps: nothing is worked out for them
    shared = np.zeros(len(batch.query_lens), dtype=np.int64)
    shared[batch.num_decode_rows + 1 :] = (tables_PM[1:] == tables_PM[:-1]).cumprod(axis=1).sum(axis=1)
    return tuple(shared.tolist())


class AttentionBackend(Protocol):
    """Causal attention of a micro-batch over paged keys and values that already hold the batch's own tokens."""

    name: str
    tensors_only: bool
    """Whether `forward` looks at the context's tensors and number of rows alone (and takes larger lengths than the true ones among
    its Python numbers), so that a graph may record it."""

    def forward(
        self, q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """Returns [T, N, H]. `window` is the number of positions a query sees, itself included; None for all."""
        ...


def visible(start: int, num_queries: int, context_len: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [num_queries, context_len]: query i stands at position start + i and sees what is not after it."""
    queries = torch.arange(start, start + num_queries, device=device).unsqueeze(1)
    keys = torch.arange(context_len, device=device).unsqueeze(0)
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)
