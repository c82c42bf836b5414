"""The portable backend against a plain softmax, over random batches; rows that go together; nothing depends on padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.attention.base import AttentionContext
from stages.attention.portable import PortableAttention, together
from stages.attention.self_check import batch_context

CPU = torch.device("cpu")


def plain_softmax(q_TNH, keys, values, context: AttentionContext, window: int | None) -> torch.Tensor:
    """Every query alone, in float64, straight from the definition."""
    out, token = [], 0
    block = keys.shape[1]
    group = q_TNH.shape[1] // keys.shape[2]
    for row, (num_queries, length) in enumerate(zip(context.query_lens, context.context_lens, strict=True)):
        table = context.block_tables_RM[row].tolist()
        for position in range(length - num_queries, length):
            first = 0 if window is None else max(0, position - window + 1)
            places = [(table[p // block], p % block) for p in range(first, position + 1)]
            k = torch.stack([keys[b, s] for b, s in places]).double().repeat_interleave(group, dim=1)
            v = torch.stack([values[b, s] for b, s in places]).double().repeat_interleave(group, dim=1)
            scores = torch.einsum("nh,lnh->nl", q_TNH[token].double(), k) * q_TNH.shape[2] ** -0.5
            out.append(torch.einsum("nl,lnh->nh", scores.softmax(-1), v))
            token += 1
    return torch.stack(out)


def random_rows(data: st.DataObject) -> tuple[tuple[int, int], ...]:
    decode = data.draw(st.lists(st.integers(1, 300), max_size=6))
    prefill = data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(2, 40)), max_size=2))
    rows = [(length, 1) for length in decode] + [(before + queries, queries) for before, queries in prefill]
    return tuple(rows) or ((5, 1),)


@settings(max_examples=60)
@given(data=st.data())
def test_random_batches_agree_with_a_plain_softmax(data: st.DataObject) -> None:
    rows = random_rows(data)
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 7), (2, 7), (3, 2), (4, 1)]))
    window = data.draw(st.sampled_from([None, 1, 8, 37, 1000]))
    block = data.draw(st.sampled_from([4, 16, 256]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    padding = data.draw(st.sampled_from([0, 64]))
    context, num_blocks = batch_context(rows, block, CPU)
    torch.manual_seed(len(rows))
    # What no row owns is garbage that must not be seen.
    keys, values = (torch.randn(num_blocks + 1, block, kv_heads, 16).to(dtype) for _ in range(2))
    q = torch.randn(sum(n for _, n in rows), kv_heads * group, 16).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.attention.portable.PADDING_BLOCKS", padding)
        got = PortableAttention().forward(q, keys, values, context, window)
        again = PortableAttention().forward(q, keys, values, context, window)
    assert torch.equal(got, again), "the second layer uses what the first one worked out"
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        got.double(), plain_softmax(q, keys, values, context, window), rtol=tolerance, atol=tolerance
    )


@given(
    blocks=st.lists(st.integers(1, 2000), min_size=1, max_size=40),
    padding=st.integers(0, 100),
)
def test_every_row_is_in_one_group_and_padding_is_bounded(blocks: list[int], padding: int) -> None:
    groups = together(blocks, padding)
    assert sorted(row for group in groups for row in group) == list(range(len(blocks)))
    for group in groups:
        assert group == sorted(group)
        used = sum(blocks[row] for row in group)
        assert max(blocks[row] for row in group) * len(group) - used <= max(padding, used // 4)


def test_equal_rows_go_together_and_very_different_ones_do_not() -> None:
    assert together([13] * 16, 0) == [list(range(16))]
    assert together([2000, 1, 2000, 2], 64) == [[0, 2], [1, 3]]
    assert together([5, 6, 7], 3) == [[0, 1, 2]]
    assert together([1, 9, 9], 0) == [[1, 2], [0]]
