"""Batch-invariant attention: every query row is computed alone, by the same operations in the same shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.attention.base import AttentionContext
from stages.attention.portable import gather


class InvariantAttention:
    """One query at a time: bits depend on the query's own history only, not on neighbours, chunking or prefill."""

    name = "invariant"
    tensors_only = False

    def forward(
        self, q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """See AttentionBackend."""
        out_TNH = torch.empty_like(q_TNH)
        token = 0
        for row, (num_queries, length) in enumerate(zip(context.query_lens, context.context_lens, strict=True)):
            k_LKH = gather(keys_BSKH, context.block_tables_RM[row], length).float()
            v_LKH = gather(values_BSKH, context.block_tables_RM[row], length).float()
            for position in range(length - num_queries, length):
                first = 0 if window is None else max(0, position + 1 - window)
                out_TNH[token] = self._one(q_TNH[token], k_LKH[first : position + 1], v_LKH[first : position + 1])
                token += 1
        return out_TNH

    def _one(self, q_NH: Tensor, k_LKH: Tensor, v_LKH: Tensor) -> Tensor:
        num_heads, head_dim = q_NH.shape
        num_kv_heads = k_LKH.shape[1]
        q_KGH = q_NH.float().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
        # Contiguous copies: strides and alignment must be the same whatever the row's place in the cache was.
        k_KHL = k_LKH.permute(1, 2, 0).contiguous()
        v_KLH = v_LKH.transpose(0, 1).contiguous()
        scores_KGL = torch.bmm(q_KGH, k_KHL) * head_dim**-0.5
        out_KGH = torch.bmm(torch.softmax(scores_KGL, dim=-1), v_KLH)
        return out_KGH.reshape(num_heads, head_dim).to(q_NH.dtype)
