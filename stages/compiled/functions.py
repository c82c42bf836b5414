"""The compiled functions of a stage, called on tensors."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch
from torch import Tensor

from stages.attention.base import AttentionContext
from stages.compiled import UNROLL
from stages.compiled.attention import ALL, decode_attention
from stages.compiled.rows import rms_norm, rotate_and_store

# Work of fewer elements is over before another thread has begun.
PARALLEL_ELEMENTS = 1 << 16


class CompiledFunctions:
    """What replaces torch's operators between the products of a layer, for one dtype and head size."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        """Compile, or load what an earlier process compiled. Raises OSError where torch's OpenMP is not GNU's."""
        # By the name that torch loaded it under: the same library and pool.
        self._parallel: Any = ctypes.CDLL("libgomp.so.1").GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        name = str(dtype).removeprefix("torch.")
        # Kept: the code lives as long as they do.
        self._entries = rms_norm(name), rotate_and_store(name, head_dim), decode_attention(name, head_dim)
        self._norm, self._rotate, self._attend = (entry.address for entry in self._entries)
        self._alone = {entry.address: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.address) for entry in self._entries}

    def norm(self, x_TD: Tensor, weight_D: Tensor, epsilon_1: Tensor) -> Tensor:
        """See layers.ops.RMSNorm."""
        x_TD = x_TD.contiguous()
        num_tokens, size = x_TD.shape
        out_TD = torch.empty_like(x_TD)
        addresses = x_TD.data_ptr(), out_TD.data_ptr(), weight_D.data_ptr(), epsilon_1.data_ptr()
        threads = _threads(num_tokens * size)
        self._run(self._norm, threads, *addresses, num_tokens, size, _share(num_tokens, threads))
        return out_TD

    def rotate_and_store(
        self,
        heads_TAH: Tensor,
        num_heads: int,
        angles: tuple[Tensor, Tensor],
        slots_T: Tensor,
        keys_BSKH: Tensor,
        values_BSKH: Tensor,
    ) -> None:
        """Rotate queries and keys among the heads [T, N + 2K, H] in place, and store keys and values; see layers.ops.rotate_ and
        KVCache.write."""
        assert heads_TAH.is_contiguous()
        num_tokens, num_kv_heads = len(heads_TAH), keys_BSKH.shape[2]
        tensors = heads_TAH, *angles, slots_T, keys_BSKH, values_BSKH
        addresses = [tensor.data_ptr() for tensor in tensors]
        threads = _threads(heads_TAH.numel())
        self._run(self._rotate, threads, *addresses, num_tokens, num_heads, num_kv_heads, _share(num_tokens, threads))

    def attend(
        self, q_RNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """Attention of the decode rows [R, N, H], see AttentionBackend."""
        num_rows, num_heads, head_dim = q_RNH.shape
        block_size, num_kv_heads = keys_BSKH.shape[1:3]
        assert block_size % UNROLL == 0
        assert q_RNH.stride()[1:] == (head_dim, 1)
        out_RNH = q_RNH.new_empty(q_RNH.shape)
        tables_RM = context.block_tables_RM
        # The heads of a token lie side by side: they are read in one go, unless there are too few rows for all threads.
        span = num_kv_heads if num_rows >= 2 * torch.get_num_threads() else 1
        tensors = q_RNH, keys_BSKH, values_BSKH, out_RNH, tables_RM, context.context_lens_R
        seen = sum(context.context_lens[:num_rows]) * num_kv_heads * head_dim
        self._run(
            self._attend, _threads(seen), *(tensor.data_ptr() for tensor in tensors), num_rows, num_kv_heads,
            num_heads // num_kv_heads, tables_RM.shape[1], block_size, q_RNH.stride(0), window or ALL, span,
        )  # fmt: skip
        return out_RNH

    def _run(self, entry: int, threads: int, *arguments: int) -> None:
        given = array("q", (0, *arguments))
        address, _ = given.buffer_info()
        if threads == 1:
            self._alone[entry](address)
        else:
            self._parallel(entry, address, threads, 0)


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def _share(num_tokens: int, threads: int) -> int:
    """Tokens that a thread takes at once: four shares for each, so that one that is held up leaves the rest to the others."""
    return max(1, num_tokens // (4 * threads))
