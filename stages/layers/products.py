"""Matrix products with a weight in the form a device multiplies fastest. T tokens, I inputs, O outputs, F feed-forward.

`PlainProduct` and `PlainGate` take the checkpoint's own layout and run everywhere: the slow twin of every other form.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:  # numba is imported only where it is used
    from stages.compiled.functions import CompiledFunctions

# oneDNN chooses the blocking of a packed weight for this many rows; measured: good from 1 row to 256.
PACKED_BATCH_HINT = 16
# A widened product converts this many weights at a time, which then are still in a core's cache (2 MiB) when they are multiplied.
BLOCK_ELEMENTS = 1 << 19
# Below this many rows converting a weight costs more than a slow product with it; measured on a Zen 3.
WIDENED_ROWS = 4


class Product(Protocol):
    """A weight [O, I] and what to do with its product."""

    name: str

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, plus the residual where there is one: [T, I] → [T, O]."""
        ...


class GateProduct(Protocol):
    """The two weights [F, I] of a SwiGLU (Shazeer, 2020), stacked: gate first, then up."""

    name: str

    def __call__(self, x_TI: Tensor) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T): [T, I] → [T, F]."""
        ...


class PlainProduct:
    """F.linear on a weight [O, I]."""

    name = "plain"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """See Product."""
        out_TO = F.linear(x_TI, self._weight_OI, self._bias_O)
        return out_TO if residual_TO is None else residual_TO + out_TO


class PlainGate:
    """One product with the stacked weight [2F, I] of any form, then the activation."""

    def __init__(self, stacked: Product) -> None:
        self.name = stacked.name
        self._stacked = stacked

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See GateProduct."""
        gate_TF, up_TF = self._stacked(x_TI).chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF


def is_cpu_bfloat16(weight_OI: Tensor) -> bool:
    """Whether this weight is stored as bfloat16 where a CPU computes with it."""
    return weight_OI.device.type == "cpu" and weight_OI.dtype == torch.bfloat16


def can_pack(weight_OI: Tensor) -> bool:
    """Whether oneDNN packs this weight: float32, or bfloat16 on a CPU that has instructions for it."""
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight_OI.dtype == torch.float32 or (
        weight_OI.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACKED_BATCH_HINT)
    return packed


class PackedProduct:
    """A weight in oneDNN's blocked layout; the residual is added before rounding, in the product's float32."""

    name = "packed"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._packed, self._bias_O = _pack(weight_OI), bias_O
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_add = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """See Product."""
        out_TO: Tensor
        if residual_TO is None:
            out_TO = self._linear(x_TI, self._packed, self._bias_O, "none", [], "")
        else:
            out_TO = self._linear_add(x_TI, residual_TO, self._packed, self._bias_O, "add")
        return out_TO


class PackedGate:
    """Gate and up packed apart, so that oneDNN applies silu and the multiplication while it writes the products."""

    name = "packed"

    def __init__(self, stacked_GI: Tensor) -> None:
        gate_FI, up_FI = stacked_GI.chunk(2)
        self._gate, self._up = _pack(gate_FI), _pack(up_FI)
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_mul = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See GateProduct."""
        gate_TF = self._linear(x_TI, self._gate, None, "swish", [1.0], "")  # swish with beta 1 is silu
        out_TF: Tensor = self._linear_mul(x_TI, gate_TF, self._up, None, "mul")
        return out_TF


class CompiledWeight(NamedTuple):
    """A weight in the checkpoint's layout, or quantized with its scales (layers.quantized), for products by compiled functions
    (docs/decisions/0015)."""

    functions: CompiledFunctions
    weight_OI: Tensor
    scales: Tensor | None
    name: str


class CompiledProduct:
    """Rounded once, after bias and residual."""

    def __init__(self, weight: CompiledWeight, bias_O: Tensor | None) -> None:
        self.name, self.weight, self.bias_O = weight.name, weight, bias_O
        weight.functions.prepare(weight.weight_OI.dtype)

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """See Product."""
        return self.weight.functions.multiply(x_TI, self.weight, self.bias_O, residual_TO)


class CompiledGate:
    """Both products and the activation at once, rounded once."""

    bias_O = None

    def __init__(self, weight: CompiledWeight) -> None:
        self.name, self.weight = weight.name, weight
        weight.functions.prepare(weight.weight_OI.dtype)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See GateProduct."""
        return self.weight.functions.multiply(x_TI, self.weight, gated=True)


class WidenedProduct:
    """A bfloat16 weight multiplied in float32 a block of outputs at a time, for CPUs without instructions for bfloat16 or numba.

    There torch multiplies bfloat16 an element at a time, 4 times slower than float32 from 16 rows on and 8 times from 128. The weight
    stays as it is: a float32 copy would take twice its memory. The result is rounded once, after bias and residual.
    """

    name = "widened"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._plain = PlainProduct(weight_OI, bias_O)
        self._weight_OI, self._bias_O = weight_OI, bias_O
        self._block = max(1, BLOCK_ELEMENTS // weight_OI.shape[1])  # outputs at a time

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """See Product."""
        if len(x_TI) < WIDENED_ROWS:
            return self._plain(x_TI, residual_TO)
        wide_TI, out_TO = x_TI.float(), x_TI.new_empty(len(x_TI), len(self._weight_OI))
        for start in range(0, len(self._weight_OI), self._block):
            outputs = slice(start, start + self._block)
            block_TB = F.linear(wide_TI, _widened(self._weight_OI[outputs]))
            if self._bias_O is not None:
                block_TB += self._bias_O[outputs]
            if residual_TO is not None:
                block_TB += residual_TO[:, outputs]
            out_TO[:, outputs] = block_TB
        return out_TO


_scratch = threading.local()


def _widened(block_BI: Tensor) -> Tensor:
    """As float32 in a buffer of this thread, which the next call writes over: fresh memory would cost a page fault every 4 KiB."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < block_BI.numel():
        with torch.inference_mode(False):  # a tensor made in it could not be written to outside of it
            buffer = _scratch.buffer = torch.empty(max(BLOCK_ELEMENTS, block_BI.numel()))
    return buffer[: block_BI.numel()].view_as(block_BI).copy_(block_BI)
