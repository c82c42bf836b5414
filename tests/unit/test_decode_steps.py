"""Decode steps with one call against the same functions called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.batch import StepBatch
from stages.compiled.decode import DecodeSteps
from tests.stage_chain import BLOCK, NUM_BLOCKS, Chain
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("everywhere")

SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}


def chains(folder, monkeypatch: pytest.MonkeyPatch, cuts: list[int], **options) -> tuple[Chain, Chain]:
    together = Chain(folder, cuts, **options)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeSteps, "possible", staticmethod(lambda model: False))
        one_by_one = Chain(folder, cuts, **options)
    assert all(stage._decode is not None for stage in together.stages)
    assert all(stage._decode is None for stage in one_by_one.stages)
    return together, one_by_one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, SLIDING, {"num_key_value_heads": 4}], ids=str)
def test_the_bits_are_the_same(tmp_path, threads, monkeypatch: pytest.MonkeyPatch, dtype, changes) -> None:
    pair = chains(save_tiny(tmp_path, tiny_model(**changes)), monkeypatch, [0, 1, 4], dtype=dtype)
    counted = []
    run = DecodeSteps.run
    monkeypatch.setattr(DecodeSteps, "run", lambda *args: counted.append(0) or run(*args))
    rng = np.random.default_rng(0)
    lengths = dict.fromkeys(range(9), 0)
    decode_steps = 0
    # Prompts, decode steps of some and of all rows, over ends of blocks, and both kinds of rows together.
    for number in range(30):
        counts = {i: int(rng.integers(1, 40)) for i in lengths if not lengths[i]} if number in (0, 12) else {}
        if number == 0:
            counts = {i: n for i, n in counts.items() if i < 5}
        for i in lengths:
            if lengths[i] and rng.random() < 0.8:
                counts[i] = 1
        if not counts:
            continue
        rows = []
        for i, count in counts.items():
            lengths[i] += count
            rows.append((i, rng.integers(0, 380, count).tolist(), lengths[i]))
        decode_steps += all(count == 1 for count in counts.values())
        together, one_by_one = (chain.step(rows) for chain in pair)
        for i in counts:
            assert torch.equal(together[i], one_by_one[i])
    assert len(counted) == 2 * decode_steps > 40  # of two stages


def test_given_hidden_states_stay_as_they_are_and_the_result_is_its_own(tmp_path) -> None:
    stage = Chain(save_tiny(tmp_path), [0, 1, 3, 4]).stages[1]
    step = pb.Step(step_id=1, token_ids=np.array([1, 2], dtype="<i4").tobytes())
    for row in range(2):
        added = step.rows.add(sequence_id=row, num_tokens=1, context_len=1)
        added.block_table = np.array([row], dtype="<i4").tobytes()
        added.sampling.SetInParent()
    batch = StepBatch.from_step(step, vocab_size=384, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK)
    torch.manual_seed(0)
    given = torch.randn(2, 64)
    kept = given.clone()
    first = stage.execute(batch, given)
    result = first.clone()
    assert torch.equal(given, kept)
    assert not torch.equal(first, given)
    stage.execute(batch, 2 * given)
    assert torch.equal(first, result)


@pytest.mark.parametrize(
    "options",
    [{"packed_weights": False}, {"batch_invariant": True}, {"compiled": False}],
    ids=str,
)
def test_layers_that_are_not_all_compiled_are_called_one_by_one(tmp_path, options) -> None:
    chain = Chain(save_tiny(tmp_path), [0, 4], **options)
    assert chain.stages[0]._decode is None


def test_a_new_cache_is_the_one_that_is_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = chains(save_tiny(tmp_path), monkeypatch, [0, 4])
    for number, num_blocks in enumerate((NUM_BLOCKS + 1, NUM_BLOCKS)):
        logits = []
        for chain in pair:
            with monkeypatch.context() as patch:
                if chain is pair[1]:
                    patch.setattr(DecodeSteps, "possible", staticmethod(lambda model: False))
                chain.stages[0].allocate_kv(num_blocks)
            chain.step([(number, [5, 6, 7], 3)])
            logits.append(chain.step([(number, [8], 4)])[number])
        assert torch.equal(*logits)
