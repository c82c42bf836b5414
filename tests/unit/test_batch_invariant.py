"""Batch-invariant mode: a sequence's logits have the same bits alone, in any batch, chunking and split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stage_chain import Chain
from tests.tiny import save_tiny

PROMPT = [(17 * i * i + 5) % 380 + 1 for i in range(45)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def alone(request, folder):
    """The dtype, and the logits after the whole prompt, computed alone in one piece by one stage."""
    chain = Chain(folder, [0, 4], dtype=request.param, batch_invariant=True)
    return request.param, chain.step([(0, PROMPT, len(PROMPT))])[0]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_do_not_depend_on_company_chunks_or_split(data: st.DataObject, alone, folder) -> None:
    dtype, expected = alone
    cuts = data.draw(st.sampled_from([[0, 4], [0, 1, 4], [0, 2, 3, 4]]))
    chain = Chain(folder, cuts, dtype=dtype, batch_invariant=True)
    ends = sorted(data.draw(st.sets(st.integers(1, len(PROMPT) - 1), max_size=4)) | {len(PROMPT)})
    start = 0
    for number, end in enumerate(ends):
        neighbours = [
            (100 * number + i, [(i + j) % 380 + 1 for j in range(length)], length)
            for i, length in enumerate(data.draw(st.lists(st.integers(1, 20), max_size=4)), start=1)
        ]
        got = chain.step([*neighbours, (0, PROMPT[start:end], end)])[0]
        start = end
    assert torch.equal(got, expected)


def test_decode_gives_the_bits_of_prefill(alone, folder) -> None:
    dtype, expected = alone
    chain = Chain(folder, [0, 2, 4], dtype=dtype, batch_invariant=True)
    chain.step([(0, PROMPT[:40], 40)])
    for position in range(40, len(PROMPT)):
        got = chain.step([(0, PROMPT[position : position + 1], position + 1)])[0]
    assert torch.equal(got, expected)


def test_the_ordinary_mode_does_not_promise_it(folder) -> None:
    """Guards the tests above: without the mode, some batch changes some bit, so they can fail."""
    chain = Chain(folder, [0, 4])
    alone = chain.step([(0, PROMPT, len(PROMPT))])[0]
    differs = False
    for i in range(1, 20):
        chunk = 2 * i
        chain.step([(i, PROMPT[:chunk], chunk)])
        differs |= not torch.equal(chain.step([(i, PROMPT[chunk:], len(PROMPT))])[i], alone)
    assert differs
