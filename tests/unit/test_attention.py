"""The self-check lets right backends through and finds wrong ones; portable and invariant attention agree."""

from __future__ import annotations

import pytest
import torch

from stages.attention.invariant import InvariantAttention
from stages.attention.portable import PortableAttention
from stages.attention.self_check import self_check

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32, "device": torch.device("cpu")}


class IgnoresBlockTable(PortableAttention):
    name = "ignores block table"

    def forward(self, q_TNH, keys_BSKH, values_BSKH, context, window):
        tables = context.block_tables_RM
        straight = torch.arange(tables.shape[1], dtype=tables.dtype).expand_as(tables)
        object.__setattr__(context, "block_tables_RM", straight)
        out = super().forward(q_TNH, keys_BSKH, values_BSKH, context, window)
        object.__setattr__(context, "block_tables_RM", tables)
        return out


class NaNBeyond2048(PortableAttention):
    name = "NaN beyond 2048"

    def forward(self, q_TNH, keys_BSKH, values_BSKH, context, window):
        out = super().forward(q_TNH, keys_BSKH, values_BSKH, context, window)
        if context.num_decode_rows == len(context.query_lens) and max(context.context_lens) > 2048:
            out[0] = float("nan")
        return out


class Raises(PortableAttention):
    name = "raises"

    def forward(self, q_TNH, keys_BSKH, values_BSKH, context, window):
        raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("block_size_tokens", [16, 256])
def test_invariant_attention_agrees_with_the_oracle(block_size_tokens: int, window: int | None) -> None:
    check = self_check(InvariantAttention(), block_size_tokens=block_size_tokens, window=window, **SHAPE)
    assert check.passed, check.detail
    assert 0 < check.worst < 1e-5


@pytest.mark.parametrize("backend", [IgnoresBlockTable(), NaNBeyond2048(), Raises()], ids=lambda b: b.name)
def test_wrong_backends_are_found(backend) -> None:
    check = self_check(backend, block_size_tokens=16, **SHAPE)
    assert not check.passed
    assert backend.name in check.detail
