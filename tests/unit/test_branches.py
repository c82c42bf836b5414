"""Rows that continue one context: which are put together, and that together they attend to what each attends to alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.attention import branches
from stages.attention.base import AttentionContext
from stages.attention.branches import Group, groups
from stages.attention.portable import PortableAttention
from stages.batch import StepBatch

SLOTS, BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 16, 256, 6, 2, 16


def context_of(rows: list[tuple[list[int], int, int]]) -> AttentionContext:
    """Rows of (block table, queries, context length)."""
    step = pb.Step(step_id=1, token_ids=np.zeros(sum(count for _, count, _ in rows), dtype="<i4").tobytes())
    for number, (table, count, length) in enumerate(rows):
        row = step.rows.add(sequence_id=number, num_tokens=count, context_len=length)
        row.block_table = np.array(table[: -(-length // SLOTS)], dtype="<i4").tobytes()
    batch = StepBatch.from_step(step, vocab_size=8, num_blocks=BLOCKS, block_size_tokens=SLOTS)
    return AttentionContext.from_batch(batch, [torch.from_numpy(array) for array in batch.attention_arrays])


def grouped(context: AttentionContext) -> list[Group]:
    return groups(
        context.query_lens, context.context_lens, context.shared_blocks,
        first=context.num_decode_rows, block_size_tokens=SLOTS, num_heads=HEADS,
    )  # fmt: skip


def rows_of(rng: random.Random, *, context_len: int, lengths: list[int]) -> list[tuple[list[int], int, int]]:
    """Continuations of one context, each of so many tokens: the last token of the context and its own but the last."""
    free = list(range(BLOCKS))
    rng.shuffle(free)
    shared = [free.pop() for _ in range((context_len - 1) // SLOTS)]
    rows = []
    for length in lengths:
        end = context_len - 1 + length
        own = [free.pop() for _ in range(-(-end // SLOTS) - len(shared))]
        rows.append((shared + own, length, end))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context_len", [65, 100, 128, 160])
@pytest.mark.parametrize("seed", range(3))
def test_together_as_alone(dtype: torch.dtype, context_len: int, seed: int) -> None:
    rng = random.Random(seed)
    lengths = sorted((rng.randint(2, 20) for _ in range(9)), reverse=True)
    decode = [([7, 8], 1, 20)] * 2
    alone = [(list(range(40, 50)), 33, 150), (list(range(60, 70)), 5, 5)]
    rows = [*decode, alone[0], *rows_of(rng, context_len=context_len, lengths=lengths), alone[1]]
    torch.manual_seed(seed)
    q_TNH = torch.randn(sum(count for _, count, _ in rows), HEADS, HEAD_DIM).to(dtype)
    keys_BSKH, values_BSKH = (torch.randn(BLOCKS, SLOTS, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    context = context_of(rows)
    assert [group.shared_blocks for group in grouped(context)] == [0, (context_len - 1) // SLOTS, 0]
    plain = dataclasses.replace(context, shared_blocks=(), per_step={})
    backend = PortableAttention()
    together, each = (backend.forward(q_TNH, keys_BSKH, values_BSKH, one, None) for one in (context, plain))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together, each, rtol=tolerance, atol=tolerance)
    # A window sees less than the whole context: rows are computed one by one.
    windowed, alone_windowed = (backend.forward(q_TNH, keys_BSKH, values_BSKH, one, 40) for one in (context, plain))
    assert torch.equal(windowed, alone_windowed)


def test_what_is_not_put_together() -> None:
    rng = random.Random(0)
    rows = rows_of(rng, context_len=200, lengths=[8] * 6)
    assert grouped(context_of(rows)) == [Group(0, 6, 12)]
    # Too few rows, too little in common, too many queries.
    assert all(group.shared_blocks == 0 for group in grouped(context_of(rows[:3])))
    assert all(group.shared_blocks == 0 for group in grouped(context_of(rows_of(rng, context_len=64, lengths=[8] * 6))))
    long = rows_of(rng, context_len=200, lengths=[branches.MAX_QUERIES + 1] * 5)
    assert all(group.shared_blocks == 0 for group in grouped(context_of(long)))
    # Blocks in common count only as far as they lie before the queries: these rows compute their context themselves.
    whole = [(table, 30, 30) for table, _, _ in rows]
    assert all(group.shared_blocks == 0 for group in grouped(context_of(whole)))


def test_scores_together_are_bounded() -> None:
    rows = rows_of(random.Random(1), context_len=500, lengths=[16] * 40)
    found = grouped(context_of(rows))
    assert len(found) > 1
    assert [group.end for group in found[:-1]] == [group.first for group in found[1:]]
    for group in found:
        assert (group.end - group.first) * 16 * HEADS * 515 <= branches.MAX_SCORES


def test_every_row_is_in_one_group() -> None:
    rng = random.Random(2)
    for _ in range(200):
        count = rng.randint(1, 12)
        queries = [rng.choice((2, 5, 40)) for _ in range(count)]
        contexts = [query + rng.randrange(300) for query in queries]
        shared = [0, *(rng.choice((0, 3, 8, 20)) for _ in range(count - 1))]
        found = groups(queries, contexts, shared, first=0, block_size_tokens=SLOTS, num_heads=HEADS)
        assert [row for group in found for row in range(group.first, group.end)] == list(range(count))
        for group in found:
            if group.shared_blocks:
                of_group = range(group.first, group.end)
                assert all(group.shared_blocks * SLOTS <= contexts[row] - queries[row] for row in of_group)
                assert all(group.shared_blocks <= shared[row] for row in of_group[1:])
