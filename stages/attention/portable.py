"""Attention with torch's scaled_dot_product_attention: runs everywhere, the oracle of every faster backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.attention.base import AttentionContext, visible


def gather(cache_BSKH: Tensor, table_M: Tensor, length: int) -> Tensor:
    """The first `length` positions of one sequence, [length, K, H]."""
    num_blocks = -(-length // cache_BSKH.shape[1])
    return cache_BSKH[table_M[:num_blocks].long()].flatten(0, 1)[:length]


class PortableAttention:
    """Decode rows in one padded call, prefill rows one by one."""

    name = "portable"

    def forward(
        self, q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """See AttentionBackend."""
        out_TNH = torch.empty_like(q_TNH)
        decode = context.num_decode_rows
        if decode:
            out_TNH[:decode] = self._decode(q_TNH[:decode], keys_BSKH, values_BSKH, context, window)
        start = decode
        for row in range(decode, len(context.query_lens)):
            end = start + context.query_lens[row]
            length = context.context_lens[row]
            table_M = context.block_tables_RM[row]
            out_TNH[start:end] = self._prefill(
                q_TNH[start:end], gather(keys_BSKH, table_M, length), gather(values_BSKH, table_M, length), window
            )
            start = end
        return out_TNH

    def _decode(
        self, q_RNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        num_rows, num_heads, head_dim = q_RNH.shape
        num_kv_heads = keys_BSKH.shape[2]
        longest = max(context.context_lens[:num_rows])
        num_blocks = -(-longest // keys_BSKH.shape[1])
        tables_RM = context.block_tables_RM[:num_rows, :num_blocks].long()
        k_RKLH = keys_BSKH[tables_RM].flatten(1, 2)[:, :longest].transpose(1, 2)
        v_RKLH = values_BSKH[tables_RM].flatten(1, 2)[:, :longest].transpose(1, 2)
        lengths_R1 = context.context_lens_R[:num_rows, None]
        positions_L = torch.arange(longest, device=q_RNH.device)
        mask_RL = positions_L < lengths_R1
        if window is not None:
            mask_RL &= positions_L >= lengths_R1 - window
        # The query heads of a KV head become rows of one product: far cheaper than repeating keys and values.
        q_RKGH = q_RNH.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
        out_RKGH = F.scaled_dot_product_attention(q_RKGH, k_RKLH, v_RKLH, attn_mask=mask_RL[:, None, None])
        return out_RKGH.reshape(num_rows, num_heads, head_dim)

    def _prefill(self, q_QNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, window: int | None) -> Tensor:
        num_queries, num_heads, _ = q_QNH.shape
        length, num_kv_heads, _ = k_LKH.shape
        group = num_heads // num_kv_heads
        mask_QL = visible(length - num_queries, num_queries, length, window, q_QNH.device)
        k_NLH = k_LKH.transpose(0, 1).repeat_interleave(group, dim=0)
        v_NLH = v_LKH.transpose(0, 1).repeat_interleave(group, dim=0)
        out_1NQH = F.scaled_dot_product_attention(
            q_QNH.transpose(0, 1)[None], k_NLH[None], v_NLH[None], attn_mask=mask_QL
        )
        return out_1NQH[0].transpose(0, 1)
