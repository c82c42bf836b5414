"""The compiled functions of a stage, called on tensors."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.attention.base import AttentionContext
from stages.compiled import UNROLL
from stages.compiled.attention import ALL, decode_attention
from stages.compiled.calls import CALL_NUMBERS, all_calls
from stages.compiled.products import ROW_BLOCK, STREAMS, product
from stages.compiled.rows import rms_norm, rotate_and_store, widen
from stages.compiled.tiles import GROUP, HAS_AVX512, LANES
from stages.layers.products import CompiledWeight

Call = list[int]

# Work of fewer elements is over before another thread has begun.
PARALLEL_ELEMENTS = 1 << 16
# Elements of a norm that take as long as an element of a key and of a value.
ATTENTION_WORK = 4
# Of rows that are widened at once: they stay in the cache that cores share.
WIDENED_ROWS = 4 * ROW_BLOCK
# Weights of a share of a product: they stay in a core's second cache while the rows pass by.
SHARE_BYTES = 256 << 10


class CompiledFunctions:
    """What replaces torch's operators in the layers, for one dtype and head size.

    A method that ends in `_call` gives a call as numbers: the function's address, threads, and its arguments (see its module). It is
    made with `run`, while the tensors live, or together with others (stages.compiled.decode).
    """

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        """Compile, or load what an earlier process compiled. Raises OSError where torch's OpenMP is not GNU's."""
        # By the name that torch loaded it under: the same library and pool.
        self._parallel: Any = ctypes.CDLL("libgomp.so.1").GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        self.dtype, self._name = dtype, str(dtype).removeprefix("torch.")
        self._entries: list[Any] = []
        self._alone: dict[int, Any] = {}
        self._products: dict[torch.dtype, int] = {}
        self._norm, self._rotate = (
            self._enter(rms_norm(self._name)),
            self._enter(rotate_and_store(self._name, head_dim)),
        )
        self._attend = self._enter(decode_attention(self._name, head_dim))
        self._widen = self._run_all = 0  # beside products alone

    def prepare(self, weight_dtype: torch.dtype) -> None:
        """Compile products with such weights, and what goes with them; int8 are quantized ones, uint8 pairs of int4."""
        if not self._products:
            self._widen, self._run_all = self._enter(widen(self._name)), self._enter(all_calls())
        if weight_dtype not in self._products:
            weights = {torch.int8: "int8", torch.uint8: "int4"}.get(weight_dtype, self._name)
            self._products[weight_dtype] = self._enter(product(self._name, weights))

    def can_multiply(self, weight_OI: Tensor, *, as_int4: bool = False) -> bool:
        """Whether `multiply` takes this weight [O, I], gated or not, as it is or quantized, and is the fastest there is."""
        outputs, inputs = weight_OI.shape
        fits = not outputs % (2 * STREAMS) and not inputs % (GROUP if as_int4 else LANES)
        return fits and not onednn_is_faster(self.dtype)

    def int4_weight(self, q_OI: Tensor, scale_OG: Tensor, offset_OG: Tensor) -> tuple[Tensor, Tensor]:
        """A weight (q - 8) · scale + offset as `multiply` takes it, uint8 [O, I / 2], and its scales, float32 [O, G, 2]."""
        assert q_OI.shape[1] == GROUP * scale_OG.shape[1]
        lower, upper = q_OI.to(torch.uint8).unflatten(1, (-1, 2, LANES)).unbind(2)
        scale_OG, offset_OG = scale_OG.float(), offset_OG.float()
        return (lower | upper << 4).flatten(1), torch.stack((scale_OG, offset_OG - 8 * scale_OG), -1).contiguous()

    def multiply(
        self,
        x_TI: Tensor,
        weight: CompiledWeight,
        bias_O: Tensor | None = None,
        residual_TO: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> Tensor:
        """See layers.products.Product; `gated`: GateProduct."""
        x_TI = x_TI.contiguous()
        out_TO = x_TI.new_empty((len(x_TI), len(weight.weight_OI) // (1 + gated)))
        residual_TO = None if residual_TO is None else residual_TO.contiguous()
        if self.dtype == torch.float32:
            self.run(self.multiply_call(x_TI, weight, bias_O, residual_TO, out_TO))
            return out_TO
        rows_at_once = max(1, min(WIDENED_ROWS, len(x_TI)))
        scratch_TI = torch.empty((rows_at_once, x_TI.shape[1]), dtype=torch.float32)
        for start in range(0, len(x_TI), rows_at_once):
            rows = slice(start, start + rows_at_once)
            wide_TI = scratch_TI[: len(x_TI[rows])]
            self.run(self.widen_call(x_TI[rows], wide_TI))
            residual = None if residual_TO is None else residual_TO[rows]
            self.run(self.multiply_call(wide_TI, weight, bias_O, residual, out_TO[rows]))
        return out_TO

    def multiply_call(
        self,
        wide_TI: Tensor,
        weight: CompiledWeight,
        bias_O: Tensor | None,
        residual_TO: Tensor | None,
        out_TO: Tensor,
    ) -> Call:
        """Of contiguous float32 rows, with a weight that was prepared for; into `out_TO`, which may be the residual. Gated, where the
        weight has twice its columns."""
        weight_OI = weight.weight_OI
        (num_tokens, inputs), outputs = wide_TI.shape, out_TO.shape[1]
        gated = len(weight_OI) // outputs - 1
        threads = _threads(num_tokens * weight_OI.numel())
        share = min(SHARE_BYTES // (weight_OI[0].nbytes * (1 + gated)), outputs // (4 * threads))
        tensors = wide_TI, weight_OI, weight.scales, bias_O, residual_TO, out_TO
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        share = max(1, share // STREAMS) * STREAMS
        entry = self._products[weight_OI.dtype]
        return [entry, threads, 0, *addresses, num_tokens, inputs, outputs, share, gated]

    def widen_call(self, x: Tensor, wide: Tensor) -> Call:
        """Of as many elements as `x` has."""
        count = x.numel()
        threads = _threads(count)
        return [self._widen, threads, 0, x.data_ptr(), wide.data_ptr(), count, -(-count // threads)]

    def norm(self, x_TD: Tensor, weight_D: Tensor, epsilon_1: Tensor) -> Tensor:
        """See layers.ops.RMSNorm."""
        x_TD = x_TD.contiguous()
        out_TD = torch.empty_like(x_TD)
        self.run(self.norm_call(x_TD, weight_D, epsilon_1, out_TD))
        return out_TD

    def norm_call(self, x_TD: Tensor, weight_D: Tensor, epsilon_1: Tensor, out_TD: Tensor) -> Call:
        """Of contiguous rows."""
        num_tokens, size = x_TD.shape
        threads = _threads(num_tokens * size)
        addresses = x_TD.data_ptr(), out_TD.data_ptr(), weight_D.data_ptr(), epsilon_1.data_ptr()
        return [self._norm, threads, 0, *addresses, num_tokens, size, _share(num_tokens, threads)]

    def rotate_call(
        self,
        heads_TAH: Tensor,
        num_heads: int,
        angles: tuple[Tensor, Tensor],
        slots_T: Tensor,
        keys_BSKH: Tensor,
        values_BSKH: Tensor,
    ) -> Call:
        """Rotate queries and keys among the heads [T, N + 2K, H] in place, and store keys and values; see layers.ops.rotate_ and
        KVCache.write."""
        assert heads_TAH.is_contiguous()
        num_tokens = len(heads_TAH)
        threads = _threads(heads_TAH.numel())
        addresses = [tensor.data_ptr() for tensor in (heads_TAH, *angles, slots_T, keys_BSKH, values_BSKH)]
        return [
            self._rotate, threads, 0, *addresses, num_tokens, num_heads, keys_BSKH.shape[2], _share(num_tokens, threads),
        ]  # fmt: skip

    def attend(
        self, q_RNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """Attention of the decode rows [R, N, H], see AttentionBackend."""
        out_RNH = q_RNH.new_empty(q_RNH.shape)
        self.run(self.attend_call(q_RNH, keys_BSKH, values_BSKH, context, window, out_RNH))
        return out_RNH

    def attend_call(
        self,
        q_RNH: Tensor,
        keys_BSKH: Tensor,
        values_BSKH: Tensor,
        context: AttentionContext,
        window: int | None,
        out_RNH: Tensor,
    ) -> Call:
        """Into contiguous `out_RNH`; the heads of a query lie side by side."""
        num_rows, num_heads, head_dim = q_RNH.shape
        block_size, num_kv_heads = keys_BSKH.shape[1:3]
        assert block_size % UNROLL == 0
        assert q_RNH.stride()[1:] == (head_dim, 1)
        tables_RM = context.block_tables_RM
        # The heads of a token lie side by side: they are read in one go, unless there are too few rows for all threads.
        span = num_kv_heads if num_rows >= 2 * torch.get_num_threads() else 1
        tensors = q_RNH, keys_BSKH, values_BSKH, out_RNH, tables_RM, context.context_lens_R
        threads = _threads(ATTENTION_WORK * sum(context.context_lens[:num_rows]) * num_kv_heads * head_dim)
        return [
            self._attend, threads, 0, *(tensor.data_ptr() for tensor in tensors), num_rows, num_kv_heads,
            num_heads // num_kv_heads, tables_RM.shape[1], block_size, q_RNH.stride(0), window or ALL, span,
        ]  # fmt: skip

    def run(self, call: Call) -> None:
        """Make a call."""
        entry, threads, *arguments = call
        given = array("q", arguments)
        address, _ = given.buffer_info()
        if threads == 1:
            self._alone[entry](address)
        else:
            self._parallel(entry, address, threads, 0)

    def run_all(self, table: NDArray[np.int64]) -> None:
        """Make the calls of a table [..., CALL_NUMBERS], in their order, once products were prepared for."""
        parallel = ctypes.cast(self._parallel, ctypes.c_void_p).value or 0
        self.run([self._run_all, 1, 0, parallel, table.ctypes.data, table.size // CALL_NUMBERS])

    def _enter(self, function: Any) -> int:
        self._entries.append(function)  # kept: the code lives as long as it does
        address: int = function.address
        self._alone[address] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        return address


def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions that the compiled products do not use, or were not measured with."""
    return HAS_AVX512 if dtype == torch.float32 else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def _share(num_tokens: int, threads: int) -> int:
    """Tokens that a thread takes at once: four shares for each, so that one that is held up leaves the rest to the others."""
    return max(1, num_tokens // (4 * threads))
