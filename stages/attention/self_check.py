"""Compare a fast attention backend with the portable oracle on this very device, before it serves anyone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.attention.base import AttentionBackend, AttentionContext
from stages.attention.portable import PortableAttention

# (context length, query length) of each row: several sequences, contexts over 2,048, decode only and mixed, few and many.
CASES: dict[str, tuple[tuple[int, int], ...]] = {
    "decode, few rows": ((2304, 1), (17, 1)),
    "decode, many rows": tuple((64 + 97 * i, 1) for i in range(32)),
    "mixed": ((2500, 1), (31, 1), (2200, 152), (40, 40)),
    "prefill": ((2100, 100), (64, 64)),
}


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What the comparison said. `worst` is the largest absolute difference over all cases."""

    passed: bool
    worst: float
    detail: str


def self_check(
    backend: AttentionBackend,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> SelfCheck:
    """Run every case through both. Differences up to the dtype's rounding of a value of order one are allowed."""
    tolerance = 32 * torch.finfo(dtype).eps
    oracle, worst = PortableAttention(), 0.0
    generator = torch.Generator().manual_seed(0)
    for name, rows in CASES.items():
        context, num_blocks = batch_context(rows, block_size_tokens, device)
        shape = (num_blocks, block_size_tokens, num_kv_heads, head_dim)
        keys, values = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        q_TNH = torch.randn(sum(context.query_lens), num_heads, head_dim, generator=generator).to(device, dtype)
        try:
            got = backend.forward(q_TNH, keys, values, context, window)
        except RuntimeError as error:
            return SelfCheck(False, float("inf"), f"{backend.name} failed on {name}: {error}")
        difference = (got.float() - oracle.forward(q_TNH, keys, values, context, window).float()).abs().max().item()
        if not difference <= tolerance:  # NaN is not within any tolerance
            return SelfCheck(False, difference, f"{backend.name} differs from the oracle by {difference:.3g} on {name}")
        worst = max(worst, difference)
    return SelfCheck(True, worst, f"{backend.name} agrees with the oracle within {worst:.3g}")


def batch_context(
    rows: tuple[tuple[int, int], ...], block_size_tokens: int, device: torch.device
) -> tuple[AttentionContext, int]:
    """The context of rows of (context length, query length), and how many blocks they take.

    Rows lie over scattered blocks, so that a kernel that ignores the block table is found out.
    """
    lengths = np.array([length for length, _ in rows], dtype=np.int32)
    queries = np.array([count for _, count in rows], dtype=np.int32)
    blocks = -(-lengths // block_size_tokens)
    order = np.random.default_rng(0).permutation(int(blocks.sum())).astype(np.int32)
    tables = np.zeros((len(rows), int(blocks.max())), dtype=np.int32)
    taken = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = order[taken : taken + count]
        taken += int(count)
    starts = np.concatenate(([0], queries.cumsum())).astype(np.int32)
    none = torch.zeros(int(queries.sum()), dtype=torch.int64, device=device)
    context = AttentionContext(
        num_decode_rows=int((queries == 1).sum()),
        query_lens=tuple(queries.tolist()),
        context_lens=tuple(lengths.tolist()),
        query_starts_R1=torch.from_numpy(starts).to(device),
        context_lens_R=torch.from_numpy(lengths).to(device),
        block_tables_RM=torch.from_numpy(tables).to(device),
        positions_T=none,
        slots_T=none,
    )
    return context, taken
