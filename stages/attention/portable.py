"""Attention with torch's scaled_dot_product_attention: runs everywhere, the oracle of every faster backend.

What depends on the batch but not on the layer (which rows go together, their blocks, masks) is worked out once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.attention import branches
from stages.attention.base import AttentionContext, visible

# Slices are `narrow`, `split` and `index_select` rather than brackets throughout: a build of torch without CUDA cannot
# index a fake CUDA tensor, and this code is checked at full size on fake devices.

# Decode rows share a padded call while padding stays below a quarter of their blocks, or this many blocks: a call costs
# about as much as attending to that many.
PADDING_BLOCKS = 64


def gather(cache_BSKH: Tensor, tables: Tensor, length: int) -> Tensor:
    """The first `length` positions of each block table: int32 tables [..., M] → [..., length, K, H]."""
    num_blocks = -(-length // cache_BSKH.shape[1])
    tables = tables.narrow(-1, 0, num_blocks)
    blocks = cache_BSKH.index_select(0, tables.flatten())
    return blocks.view(*tables.shape[:-1], -1, *cache_BSKH.shape[2:]).narrow(-3, 0, length)


def together(num_blocks: Sequence[int], padding_blocks: int) -> list[list[int]]:
    """Groups of decode rows that are padded to one length, given the KV blocks each reads; every row is in one group.

    A group is in ascending order; if one holds all rows, nothing needs to be reordered.
    """
    groups: list[list[int]] = []
    used = longest = 0
    for row in sorted(range(len(num_blocks)), key=lambda row: (-num_blocks[row], row)):
        blocks = num_blocks[row]
        if groups:
            padding = longest * (len(groups[-1]) + 1) - (used + blocks)
            if padding <= max(padding_blocks, (used + blocks) // 4):
                groups[-1].append(row)
                used += blocks
                continue
        groups.append([row])
        used = longest = blocks
    return [sorted(group) for group in groups]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows of one padded call: P rows, X blocks each, L = X · S positions."""

    rows_P: Tensor | None  # int64; None where the group is all the decode rows
    blocks_PX: Tensor  # int32 [P · X], of the cache
    num_rows: int
    mask_P11L: Tensor  # 0 where the row sees the position, else -inf; in the queries' dtype


class PortableAttention:
    """Decode rows in few padded calls; prefill rows one by one, unless they continue one context (`branches`)."""

    name = "portable"
    tensors_only = False

    def forward(
        self, q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """See AttentionBackend."""
        decode = context.num_decode_rows
        groups = self._prefill_groups(context, window, keys_BSKH.shape[1], q_TNH.shape[1])
        sizes = [sum(context.query_lens[group.first : group.end]) for group in groups]
        q_groups = q_TNH.split([decode, *sizes])
        parts = [self._decode(q_groups[0], keys_BSKH, values_BSKH, context, window)] if decode else []
        for group, q_QNH in zip(groups, q_groups[1:], strict=True):
            row = group.first
            if group.shared_blocks:
                plan = self._plan(group, context, keys_BSKH.shape[1])
                parts.append(branches.attend(q_QNH, keys_BSKH, values_BSKH, plan))
                continue
            table_M = context.block_tables_RM.select(0, row)
            length = context.context_lens[row]
            k_LKH, v_LKH = gather(keys_BSKH, table_M, length), gather(values_BSKH, table_M, length)
            mask_PL = self._prefill_mask(context, row, window, q_TNH.shape[1] // k_LKH.shape[1], q_TNH)
            parts.append(self._prefill(q_QNH, k_LKH, v_LKH, mask_PL))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, q_RNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        num_rows, num_heads, head_dim = q_RNH.shape
        num_kv_heads = keys_BSKH.shape[2]
        # The query heads of a KV head become rows of one product: far cheaper than repeating keys and values.
        q_RKGH = q_RNH.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
        groups = self._decode_groups(context, window, keys_BSKH.shape[1], q_RNH)
        out_RKGH = torch.empty_like(q_RKGH) if len(groups) > 1 else q_RKGH
        for group in groups:
            q_PKGH = q_RKGH if group.rows_P is None else q_RKGH.index_select(0, group.rows_P)
            k_PKLH, v_PKLH = (
                cache.index_select(0, group.blocks_PX).view(group.num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
                for cache in (keys_BSKH, values_BSKH)
            )
            out_PKGH = F.scaled_dot_product_attention(q_PKGH, k_PKLH, v_PKLH, attn_mask=group.mask_P11L)
            if group.rows_P is None:
                out_RKGH = out_PKGH
            else:
                out_RKGH.index_copy_(0, group.rows_P, out_PKGH)
        return out_RKGH.reshape(num_rows, num_heads, head_dim)

    def _decode_groups(
        self, context: AttentionContext, window: int | None, block_size_tokens: int, like: Tensor
    ) -> list[DecodeGroup]:
        key = (self.name, "decode", window)
        if key not in context.per_step:
            num_rows = context.num_decode_rows
            lengths = context.context_lens[:num_rows]
            # Blocks [first, end) of each row's table hold what it sees.
            ends = [-(-length // block_size_tokens) for length in lengths]
            firsts = [0 if window is None else max(0, length - window) // block_size_tokens for length in lengths]
            groups = []
            rows_in_groups = together([end - first for first, end in zip(firsts, ends, strict=True)], PADDING_BLOCKS)
            for rows in rows_in_groups:
                wide = max(ends[row] - firsts[row] for row in rows)
                # A shorter row reads further blocks of its table, or the table's padding: the mask hides both.
                tables_PX = torch.stack([self._table(context.block_tables_RM, row, firsts[row], wide) for row in rows])
                starts_P = torch.tensor([firsts[row] * block_size_tokens for row in rows], device=like.device)
                ends_P = torch.tensor([lengths[row] for row in rows], device=like.device)
                positions_PL = starts_P.unsqueeze(1) + torch.arange(wide * block_size_tokens, device=like.device)
                hidden_PL = positions_PL >= ends_P.unsqueeze(1)
                if window is not None:
                    hidden_PL |= positions_PL < ends_P.unsqueeze(1) - window
                mask_PL = torch.zeros_like(positions_PL, dtype=like.dtype).masked_fill_(hidden_PL, float("-inf"))
                groups.append(
                    DecodeGroup(
                        None if len(rows_in_groups) == 1 else torch.tensor(rows, device=like.device),
                        tables_PX.flatten(),
                        len(rows),
                        mask_PL.unsqueeze(1).unsqueeze(1),
                    )
                )
            context.per_step[key] = groups
        known: list[DecodeGroup] = context.per_step[key]
        return known

    def _table(self, block_tables_RM: Tensor, row: int, first: int, wide: int) -> Tensor:
        table_X = block_tables_RM.select(0, row)
        table_X = table_X.narrow(0, first, min(wide, table_X.shape[0] - first))
        return F.pad(table_X, (0, wide - table_X.shape[0]))

    def _prefill_groups(
        self, context: AttentionContext, window: int | None, block_size_tokens: int, num_heads: int
    ) -> list[branches.Group]:
        key = (self.name, "groups", window)
        if key not in context.per_step:
            context.per_step[key] = branches.groups(
                context.query_lens,
                context.context_lens,
                () if window is not None else context.shared_blocks,
                first=context.num_decode_rows,
                block_size_tokens=block_size_tokens,
                num_heads=num_heads,
            )
        known: list[branches.Group] = context.per_step[key]
        return known

    def _plan(self, group: branches.Group, context: AttentionContext, block_size_tokens: int) -> branches.Plan:
        key = (self.name, "branches", group)
        if key not in context.per_step:
            context.per_step[key] = branches.plan(group, context, block_size_tokens)
        known: branches.Plan = context.per_step[key]
        return known

    def _prefill_mask(
        self, context: AttentionContext, row: int, window: int | None, group: int, like: Tensor
    ) -> Tensor | None:
        """Mask [group · Q, L] in the queries' dtype, the same for each query head of a KV head; None where it is plainly causal: a
        prompt from its beginning."""
        num_queries, length = context.query_lens[row], context.context_lens[row]
        if num_queries == length and (window is None or window >= length):
            return None
        key = (self.name, "prefill", window, row)
        if key not in context.per_step:
            seen_QL = visible(length - num_queries, num_queries, length, window, like.device)
            mask_QL = torch.zeros_like(seen_QL, dtype=like.dtype).masked_fill_(seen_QL.logical_not(), float("-inf"))
            context.per_step[key] = mask_QL.repeat(group, 1)
        mask: Tensor = context.per_step[key]
        return mask

    def _prefill(self, q_QNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, mask_PL: Tensor | None) -> Tensor:
        num_queries, num_heads, head_dim = q_QNH.shape
        length, num_kv_heads, _ = k_LKH.shape
        group = num_heads // num_kv_heads
        q_KGQH = q_QNH.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
        if mask_PL is None:
            # KV heads in the batch dimension and their query heads as heads that share one key: a view, nothing is repeated.
            k_KGLH, v_KGLH = (
                x.transpose(0, 1).unsqueeze(1).expand(num_kv_heads, group, length, head_dim) for x in (k_LKH, v_LKH)
            )
            out_KGQH = F.scaled_dot_product_attention(q_KGQH, k_KGLH, v_KGLH, is_causal=True)
        else:
            # A chunk has few queries against a long context: those of all heads of a KV head (P = G · Q) fill the kernel's blocks.
            k_1KLH, v_1KLH = (x.transpose(0, 1).unsqueeze(0) for x in (k_LKH, v_LKH))
            q_1KPH = q_KGQH.reshape(1, num_kv_heads, group * num_queries, head_dim)
            out_1KPH = F.scaled_dot_product_attention(q_1KPH, k_1KLH, v_1KLH, attn_mask=mask_PL)
            out_KGQH = out_1KPH.view(num_kv_heads, group, num_queries, head_dim)
        return out_KGQH.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
