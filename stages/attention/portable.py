"""Attention with torch's scaled_dot_product_attention: runs everywhere, the oracle of every faster backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.attention.base import AttentionContext, visible

# Slices are `narrow`, `split` and `index_select` rather than brackets throughout: a build of torch without CUDA cannot
# index a fake CUDA tensor, and this code is checked at full size on fake devices.


def gather(cache_BSKH: Tensor, tables: Tensor, length: int) -> Tensor:
    """The first `length` positions of each block table: int32 tables [..., M] → [..., length, K, H]."""
    num_blocks = -(-length // cache_BSKH.shape[1])
    tables = tables.narrow(-1, 0, num_blocks)
    blocks = cache_BSKH.index_select(0, tables.flatten())
    return blocks.view(*tables.shape[:-1], -1, *cache_BSKH.shape[2:]).narrow(-3, 0, length)


class PortableAttention:
    """Decode rows in one padded call, prefill rows one by one."""

    name = "portable"

    def forward(
        self, q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """See AttentionBackend."""
        decode = context.num_decode_rows
        q_rows = q_TNH.split([decode, *context.query_lens[decode:]])
        parts = [self._decode(q_rows[0], keys_BSKH, values_BSKH, context, window)] if decode else []
        for row, q_QNH in enumerate(q_rows[1:], start=decode):
            table_M = context.block_tables_RM.select(0, row)
            length = context.context_lens[row]
            k_LKH, v_LKH = gather(keys_BSKH, table_M, length), gather(values_BSKH, table_M, length)
            parts.append(self._prefill(q_QNH, k_LKH, v_LKH, window))
        return torch.cat(parts)

    def _decode(
        self, q_RNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        num_rows, num_heads, head_dim = q_RNH.shape
        num_kv_heads = keys_BSKH.shape[2]
        longest = max(context.context_lens[:num_rows])
        tables_RM = context.block_tables_RM.narrow(0, 0, num_rows)
        k_RKLH = gather(keys_BSKH, tables_RM, longest).transpose(1, 2)
        v_RKLH = gather(values_BSKH, tables_RM, longest).transpose(1, 2)
        lengths_R1 = context.context_lens_R.narrow(0, 0, num_rows).unsqueeze(1)
        positions_L = torch.arange(longest, device=q_RNH.device)
        mask_RL = positions_L < lengths_R1
        if window is not None:
            mask_RL &= positions_L >= lengths_R1 - window
        # The query heads of a KV head become rows of one product: far cheaper than repeating keys and values.
        q_RKGH = q_RNH.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
        mask_R11L = mask_RL.unsqueeze(1).unsqueeze(1)
        out_RKGH = F.scaled_dot_product_attention(q_RKGH, k_RKLH, v_RKLH, attn_mask=mask_R11L)
        return out_RKGH.reshape(num_rows, num_heads, head_dim)

    def _prefill(self, q_QNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, window: int | None) -> Tensor:
        num_queries, num_heads, _ = q_QNH.shape
        length, num_kv_heads, _ = k_LKH.shape
        group = num_heads // num_kv_heads
        mask_QL = visible(length - num_queries, num_queries, length, window, q_QNH.device)
        k_1NLH, v_1NLH = (x.transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0) for x in (k_LKH, v_LKH))
        q_1NQH = q_QNH.transpose(0, 1).unsqueeze(0)
        out_1NQH = F.scaled_dot_product_attention(q_1NQH, k_1NLH, v_1NLH, attn_mask=mask_QL)
        return out_1NQH.squeeze(0).transpose(0, 1)
