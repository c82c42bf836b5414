"""All 80 layers of Qwen2-72B at full shapes on a fake CUDA device: shapes, dtypes and devices are checked, no number is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gateway.planner.split import split
from stageline.errors import ConfigError
from stages.attention.base import AttentionBackend, AttentionContext
from stages.attention.portable import PortableAttention
from stages.attention.varlen import VarlenAttention
from stages.config import ModelConfig
from stages.kv_cache import KVCache
from stages.models.qwen2 import Qwen2Stage
from tests.unit.test_partition import QWEN2_72B

BLOCK = 256
CUDA = torch.device("cuda")
# (context length, query length) of each row; decode rows first.
BATCHES = {
    "decode": ((700, 1), (2048, 1), (3, 1)),
    "prefill": ((512, 512), (900, 300)),
    "mixed": ((700, 1), (900, 300)),
}


def backend(name: str) -> AttentionBackend:
    if name == "portable":
        return PortableAttention()
    return VarlenAttention(block_size_tokens=BLOCK, dtype=torch.bfloat16, device=CUDA)


def context(rows: tuple[tuple[int, int], ...]) -> AttentionContext:
    queries = [count for _, count in rows]
    total = sum(queries)
    blocks = max(-(-length // BLOCK) for length, _ in rows)
    return AttentionContext(
        num_decode_rows=queries.count(1),
        query_lens=tuple(queries),
        context_lens=tuple(length for length, _ in rows),
        query_starts_R1=torch.empty(len(rows) + 1, dtype=torch.int32, device=CUDA),
        context_lens_R=torch.empty(len(rows), dtype=torch.int32, device=CUDA),
        block_tables_RM=torch.empty(len(rows), blocks, dtype=torch.int32, device=CUDA),
        positions_T=torch.empty(total, dtype=torch.int64, device=CUDA),
        slots_T=torch.empty(total, dtype=torch.int64, device=CUDA),
    )


@pytest.mark.parametrize(
    ("num_stages", "attention"), [(4, "portable"), (8, "varlen"), (10, "portable"), (80, "varlen")]
)
def test_every_layer_runs_at_full_shapes(num_stages: int, attention: str) -> None:
    config = ModelConfig.from_dict(QWEN2_72B)
    parameters = 0
    with FakeTensorMode():
        for layers in split(config, num_stages):
            stage = Qwen2Stage(config, layers, dtype=torch.bfloat16, device=CUDA, attention=backend(attention))
            parameters += sum(p.numel() for p in stage.parameters())
            cache = KVCache(config, layers, num_blocks=32, block_size_tokens=BLOCK, dtype=torch.bfloat16, device=CUDA)
            for rows in BATCHES.values():
                total = sum(count for _, count in rows)
                shape = (total,) if stage.is_first else (total, config.hidden_size)
                dtype = torch.int64 if stage.is_first else torch.bfloat16
                hidden_TD = stage(torch.empty(shape, dtype=dtype, device=CUDA), context(rows), cache)
                assert hidden_TD.shape == (total, 8192)
                assert (hidden_TD.dtype, hidden_TD.device.type) == (torch.bfloat16, "cuda")
                if stage.is_last:
                    logits_RV = stage.compute_logits(hidden_TD.narrow(0, 0, len(rows)))
                    assert (logits_RV.shape, logits_RV.dtype) == ((len(rows), 152064), torch.float32)
    assert parameters == 72_706_203_648


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size_tokens": 16}, "ATTENTION_PAGE_SIZE"),
        ({"dtype": torch.float32}, "ATTENTION_DTYPE"),
        ({"device": torch.device("cpu")}, "ATTENTION_DEVICE"),
    ],
)
def test_what_the_kernel_would_compute_wrongly_is_refused(change, reason) -> None:
    values = {"block_size_tokens": BLOCK, "dtype": torch.bfloat16, "device": CUDA}
    with pytest.raises(ConfigError) as caught:
        VarlenAttention(**{**values, **change})
    assert caught.value.reason == reason
