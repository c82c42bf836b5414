"""Weight-only quantization on load: int8 per output channel, int4 per group of inputs, for torch's own CPU kernels or compiled ones.

O outputs, I inputs, T tokens, G groups, S inputs of a group. Hidden states, keys and values keep the stage's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.layers.products import CompiledWeight, PlainProduct

if TYPE_CHECKING:  # numba is imported only where it is used
    from stages.compiled.functions import CompiledFunctions

INT4_GROUP_SIZES = (64, 32)  # the first that divides the inputs is taken
INT4_OUTPUT_MULTIPLE = 16
_ROWS_AT_ONCE = 4096  # bounds what quantizing needs in float32 besides the weight
# torch's int8 kernel is made for few rows; from so many on, a weight is turned into the rows' dtype (exactly: 8 bits of
# mantissa hold every q) and multiplied as any other (benchmarks/quantization.py).
MANY_ROWS = 16


def int4_group_size(weight_OI: Tensor) -> int | None:
    """Inputs that share a scale; None where the int4 kernel does not take this shape."""
    outputs, inputs = weight_OI.shape
    sizes = [size for size in INT4_GROUP_SIZES if inputs % size == 0]
    return sizes[0] if sizes and outputs % INT4_OUTPUT_MULTIPLE == 0 else None


class Int8Product:
    """Symmetric int8, one scale for each output channel: weight ≈ q · scale, q in [-127, 127]."""

    name = "int8"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._bias_O = bias_O
        self._q_OI, self._scale_O = quantized_int8(weight_OI)

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """See Product."""
        if x_TI.shape[0] >= MANY_ROWS:
            parts = [F.linear(x_TI, q_RI.to(x_TI.dtype)) for q_RI in self._q_OI.split(_ROWS_AT_ONCE)]
            return _add(torch.cat(parts, 1).mul_(self._scale_O), self._bias_O, residual_TO)
        out_TO: Tensor = torch._weight_int8pack_mm(x_TI, self._q_OI, self._scale_O)
        return _add(out_TO, self._bias_O, residual_TO)

    def dequantized(self) -> Tensor:
        """float32 [O, I]: what the kernel multiplies with."""
        return self._q_OI.float() * self._scale_O.float().unsqueeze(1)


class Int4Product:
    """Asymmetric int4, scale and offset for each group of inputs: weight ≈ (q - 8) · scale + offset, q in [0, 15]."""

    name = "int4"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        group_size = int4_group_size(weight_OI)
        assert group_size is not None, f"no int4 product of {tuple(weight_OI.shape)}"
        self._bias_O, self._group_size = bias_O, group_size
        q_OI, scale_OG, offset_OG = quantized_int4(weight_OI, group_size)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_OI, 1)
        self._scales_GO2 = torch.stack((scale_OG, offset_OG), dim=-1).transpose(0, 1).contiguous()
        self._inputs = weight_OI.shape[1]

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """See Product."""
        return _add(self._multiply(x_TI, self._scales_GO2), self._bias_O, residual_TO)

    def dequantized(self) -> Tensor:
        """float32 [O, I]: what the kernel multiplies with, read back from the packed form by unit vectors."""
        ones_GO2 = torch.stack(
            (torch.ones_like(self._scales_GO2[..., 0]), torch.zeros_like(self._scales_GO2[..., 0])), dim=-1
        )
        eye_II = torch.eye(self._inputs, dtype=self._scales_GO2.dtype)
        q_OI = self._multiply(eye_II, ones_GO2).T.float()  # q - 8, exact
        scale_OG1, offset_OG1 = (x.T.float().unsqueeze(-1) for x in self._scales_GO2.unbind(-1))
        weight_OI: Tensor = (q_OI.unflatten(1, (-1, self._group_size)) * scale_OG1 + offset_OG1).flatten(1)
        return weight_OI

    def _multiply(self, x_TI: Tensor, scales_GO2: Tensor) -> Tensor:
        out_TO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, self._packed, self._group_size, scales_GO2)
        return out_TO


def quantized_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """q, int8 [O, I], and scales [O] in the weight's dtype."""
    q_OI = torch.empty_like(weight_OI, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale_O = weight_OI.new_empty(weight_OI.shape[0])
    parts = (x.split(_ROWS_AT_ONCE) for x in (weight_OI, q_OI, scale_O))
    for weight_RI, q_RI, scale_R in zip(*parts, strict=True):
        weight32_RI = weight_RI.float()
        scale_R.copy_((weight32_RI.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny))
        # Divided by the scale as it is kept: its own rounding then costs nothing.
        q_RI.copy_((weight32_RI / scale_R.float().unsqueeze(1)).round().clamp(-127, 127))
    return q_OI, scale_O


def quantized_int4(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, int32 [O, I] in [0, 15]; scales and offsets [O, G] in the weight's dtype."""
    weight_OGS = weight_OI.float().unflatten(1, (-1, group_size))
    low_OG, high_OG = weight_OGS.aminmax(dim=-1)
    scale_OG = ((high_OG - low_OG) / 15).clamp_min(torch.finfo(torch.float32).tiny).to(weight_OI.dtype)
    offset_OG = (low_OG + 8 * scale_OG.float()).to(weight_OI.dtype)
    q_OGS = (weight_OGS - offset_OG.float().unsqueeze(-1)) / scale_OG.float().unsqueeze(-1) + 8
    return q_OGS.round().clamp(0, 15).to(torch.int32).flatten(1), scale_OG, offset_OG


def compiled_weight(functions: CompiledFunctions, weight_OI: Tensor, *, as_int4: bool) -> CompiledWeight:
    """The same for products by compiled functions."""
    if as_int4:
        packed = functions.int4_weight(*quantized_int4(weight_OI, INT4_GROUP_SIZES[0]))
        return CompiledWeight(functions, *packed, "compiled int4")
    q_OI, scale_O = quantized_int8(weight_OI)
    return CompiledWeight(functions, q_OI, scale_O.float(), "compiled int8")


def dequantized_product(
    quantized: Int8Product | Int4Product, bias_O: Tensor | None, dtype: torch.dtype
) -> PlainProduct:
    """The slow twin: the quantized values in the stage's dtype and layout, multiplied as any plain weight."""
    twin = PlainProduct(quantized.dequantized().to(dtype), bias_O)
    twin.name = f"dequantized {quantized.name}"
    return twin


def _add(out_TO: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
    if bias_O is not None:
        out_TO = out_TO + bias_O
    return out_TO if residual_TO is None else residual_TO + out_TO
