"""Which attention a stage uses; the heavy import happens only where it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.attention.base import AttentionBackend
from stages.attention.invariant import InvariantAttention
from stages.attention.portable import PortableAttention

if TYPE_CHECKING:
    from stages.compiled.functions import CompiledFunctions


def make_attention(
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_size_tokens: int,
    batch_invariant: bool,
    functions: CompiledFunctions | None = None,
) -> AttentionBackend:
    """The backend for a device, and the functions compiled for it. Raises ConfigError where the CUDA kernel cannot serve the dtype or block size."""
    if batch_invariant:
        return InvariantAttention()
    if device.type == "cuda":
        from stages.attention.varlen import VarlenAttention

        return VarlenAttention(block_size_tokens=block_size_tokens, dtype=dtype, device=device)
    if functions is not None:
        from stages.attention.compiled import CompiledAttention

        return CompiledAttention(functions)
    return PortableAttention()
