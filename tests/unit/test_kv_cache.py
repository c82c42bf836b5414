"""Tags catch a block table that lies; what a sequence leaves in a block harms nobody who gets it next."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stageline.errors import InternalError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.batch import StepBatch
from stages.kv_cache import KVTags
from tests.stage_chain import BLOCK, NUM_BLOCKS, Chain
from tests.tiny import save_tiny


def batch(*rows: tuple[int, list[int], int, list[int]]) -> StepBatch:
    """(sequence, new tokens, context, block table) → a step with KV blocks of 4 tokens."""
    step = pb.Step(step_id=1, token_ids=np.array([t for _, ts, *_ in rows for t in ts], dtype="<i4").tobytes())
    for sequence, tokens, context, table in rows:
        step.rows.add(
            sequence_id=sequence, num_tokens=len(tokens), context_len=context,
            block_table=np.array(table, dtype="<i4").tobytes(),
        )  # fmt: skip
    return StepBatch.from_step(step, vocab_size=100, num_blocks=8, block_size_tokens=4)


def run(tags: KVTags, *rows: tuple[int, list[int], int, list[int]]) -> None:
    step = batch(*rows)
    tags.write(step)
    tags.check(step)


def test_honest_tables_pass_in_any_chunks_and_prefixes_may_be_shared() -> None:
    tags = KVTags(8, 4)
    run(tags, (1, [5, 6, 7, 8, 9], 5, [3, 0]))
    run(tags, (1, [10], 6, [3, 0]), (2, [5, 6], 2, [1]))
    run(tags, (2, [7, 8, 9, 10, 11, 12], 8, [1, 2]))
    run(tags, (3, [44], 5, [3, 7]))  # block 3 holds 5, 6, 7, 8: the same prefix
    run(tags, (1, [11], 7, [3, 0]))
    run(tags, (1, [11], 7, [3, 0]))  # a step again


@pytest.mark.parametrize(
    ("table", "context", "position"),
    [([3, 1], 6, 4), ([1, 2], 6, 4), ([0, 3], 6, 4), ([3, 6], 7, 4)],
    ids=["second block of another", "both blocks of another", "swapped", "never written"],
)
def test_a_lying_table_is_caught(table: list[int], context: int, position: int) -> None:
    tags = KVTags(8, 4)
    run(tags, (1, [5, 6, 7, 8, 9], 5, [3, 0]))
    run(tags, (2, [50, 60, 70, 80, 90], 5, [1, 2]))
    with pytest.raises(InternalError) as caught:
        run(tags, (1, [10], context, table))
    assert caught.value.reason == "KV_TAG_MISMATCH"
    assert caught.value.metadata["position"] == str(position)
    assert caught.value.metadata["sequence_id"] == "1"


def test_a_block_taken_from_a_running_sequence_is_caught() -> None:
    tags = KVTags(8, 4)
    run(tags, (1, [5, 6, 7, 8, 9], 5, [3, 0]))
    run(tags, (2, [1, 2, 3], 3, [3]))  # block 3 was not free
    with pytest.raises(InternalError, match="position 3 from slot 15"):
        run(tags, (1, [10], 6, [3, 0]))


def test_the_runner_checks_tags(tmp_path) -> None:
    chain = Chain(save_tiny(tmp_path / "m"), [0, 2, 4])
    chain.step([(1, [5, 6, 7], 3), (2, [9, 9], 2)])
    chain._tables[1], chain._tables[2] = chain._tables[2], chain._tables[1]
    with pytest.raises(InternalError, match="sequence 1"):
        chain.step([(1, [8], 4), (2, [9], 3)])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_a_poisoned_sequence_leaves_behind_harms_nobody(batch_invariant: bool, tmp_path) -> None:
    """NaN in a block that was freed, and in the one that padding might read, stays out of other rows."""
    folder = save_tiny(tmp_path / "m")
    rows = [(1, [3] * 40, 40), (2, [7, 8], 2), (3, list(range(9)), 9)]
    clean = Chain(folder, [0, 4], batch_invariant=batch_invariant)
    expected = [clean.step(rows), clean.step([(1, [4], 41), (2, [4], 3), (3, [4], 10)])]
    dirty = Chain(folder, [0, 4], batch_invariant=batch_invariant)
    for cache in (*dirty.stages[0]._kv._keys, *dirty.stages[0]._kv._values):
        cache.fill_(math.nan)
    got = [dirty.step(rows), dirty.step([(1, [4], 41), (2, [4], 3), (3, [4], 10)])]
    for step, want in zip(got, expected, strict=True):
        for sequence in want:
            assert torch.equal(step[sequence], want[sequence])
    assert BLOCK * NUM_BLOCKS > 40
