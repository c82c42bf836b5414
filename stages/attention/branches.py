"""Prefill rows that continue one context: its keys and values are read once for all of them.

Continuations that are scored, and short prompts behind one system prompt, are rows of few queries over the same long run of
blocks. One by one each would gather that run again, and fill its kernels with too few queries. Here the queries of all rows of
a group meet the context in one product a KV head, and each row's own positions in a batch of small ones; the softmax goes over
both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.attention.base import AttentionContext

MIN_ROWS = 4
MIN_SHARED_TOKENS = 64
MAX_QUERIES = 32  # of a row: longer ones fill the kernels by themselves
MAX_SCORES = 1 << 20  # float32 scores of a group that are there together: 4 MiB, what stays in a cache


@dataclass(frozen=True, slots=True)
class Group:
    """Rows [first, end) of a micro-batch; `shared_blocks` of their context lie before the queries of all of them, 0 for a row
    alone."""

    first: int
    end: int
    shared_blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a group's rows need, G rows, Q queries of the longest, L positions behind the shared ones, X blocks of those."""

    tokens_GQ: Tensor  # int64 [G · Q], among the group's tokens; places beyond a row's end repeat its first
    places_T: Tensor  # int64 [T], of the group's tokens in [G · Q]
    context_C: Tensor  # int32, the shared blocks
    own_GX: Tensor  # int32 [G · X], each row's own blocks
    mask_GQ1L: Tensor  # float32: 0 where the query sees the position, else -inf


def groups(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    shared_blocks: Sequence[int],
    *,
    first: int,
    block_size_tokens: int,
    num_heads: int,
) -> list[Group]:
    """Rows from `first` on, in order, each in one group. `shared_blocks` as in AttentionContext."""
    found: list[Group] = []
    num_rows = len(query_lens)
    before = [(context - query) // block_size_tokens for query, context in zip(query_lens, context_lens, strict=True)]
    while first < num_rows:
        end, shared = first + 1, 0
        while end < num_rows and shared_blocks and max(query_lens[first], query_lens[end]) <= MAX_QUERIES:
            common = min(shared_blocks[end], before[end], before[first]) if end == first + 1 else shared
            together = sum(query_lens[first : end + 1]) * num_heads * max(context_lens[first : end + 1])
            if common * block_size_tokens < MIN_SHARED_TOKENS or together > MAX_SCORES:
                break
            if min(shared_blocks[end], before[end]) < common:
                break
            end, shared = end + 1, common
        if end - first < MIN_ROWS:
            end, shared = first + 1, 0
        found.append(Group(first, end, shared))
        first = end
    return found


def plan(group: Group, context: AttentionContext, block_size_tokens: int) -> Plan:
    """The tensors of a group, on the device of the block tables."""
    device = context.block_tables_RM.device
    queries = context.query_lens[group.first : group.end]
    lengths = context.context_lens[group.first : group.end]
    longest, shared = max(queries), group.shared_blocks * block_size_tokens
    starts: list[int] = []
    places: list[int] = []
    tokens: list[int] = []
    token = 0
    for row, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        tokens += [token + place if place < count else token for place in range(longest)]
        places += range(row * longest, row * longest + count)
        starts.append(length - count - shared)
        token += count
    num_own = -(-(max(lengths) - shared) // block_size_tokens)
    tables_GM = context.block_tables_RM.narrow(0, group.first, len(queries))
    positions_GQ = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(longest, device=device)
    hidden_GQL = torch.arange(num_own * block_size_tokens, device=device) > positions_GQ.unsqueeze(-1)
    mask_GQL = torch.zeros(hidden_GQL.shape, device=device).masked_fill_(hidden_GQL, float("-inf"))
    return Plan(
        torch.tensor(tokens, device=device),
        torch.tensor(places, device=device),
        tables_GM.select(0, 0).narrow(0, 0, group.shared_blocks),
        tables_GM.narrow(1, group.shared_blocks, num_own).flatten(),
        mask_GQL.unsqueeze(2),
    )


def attend(q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, what: Plan) -> Tensor:
    """Attention of a group's tokens [T, N, H], in float32 inside. P queries of a KV head: query heads next to each other."""
    _, num_heads, head_dim = q_TNH.shape
    num_kv_heads = keys_BSKH.shape[2]
    num_rows, longest, _, own_len = what.mask_GQ1L.shape
    heads = num_heads // num_kv_heads
    q_GQKHH = q_TNH.index_select(0, what.tokens_GQ).float().unflatten(1, (num_kv_heads, heads)) * head_dim**-0.5
    q_KPH = q_GQKHH.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    k_KCH, v_KCH = (
        cache.index_select(0, what.context_C).flatten(0, 1).transpose(0, 1).float()
        for cache in (keys_BSKH, values_BSKH)
    )
    k_KGLH, v_KGLH = (
        cache.index_select(0, what.own_GX).view(num_rows, own_len, num_kv_heads, head_dim).permute(2, 0, 1, 3).float()
        for cache in (keys_BSKH, values_BSKH)
    )
    q_KGPH = q_KPH.view(num_kv_heads, num_rows, longest * heads, head_dim)
    own_KGPL = q_KGPH @ k_KGLH.transpose(2, 3)
    own_KGPL.view(num_kv_heads, num_rows, longest, heads, own_len).add_(what.mask_GQ1L)
    scores_KPL = torch.cat((torch.bmm(q_KPH, k_KCH.transpose(1, 2)), own_KGPL.flatten(1, 2)), dim=-1)
    weights_KPC, weights_KPL = torch.softmax(scores_KPL, dim=-1).split((k_KCH.shape[1], own_len), dim=-1)
    out_KPH = torch.bmm(weights_KPC, v_KCH)
    out_KPH += (weights_KPL.view(num_kv_heads, num_rows, longest * heads, own_len) @ v_KGLH).flatten(1, 2)
    out_QNH = out_KPH.view(num_kv_heads, num_rows * longest, heads, head_dim).transpose(0, 1).flatten(1, 2)
    return out_QNH.index_select(0, what.places_T).to(q_TNH.dtype)
