"""Row chunks, norms, rotary embeddings. Shapes: T tokens, D hidden size, I inputs, N heads, H head size.

Batch-invariant mode: everything that acts on a token alone runs in chunks of exactly CHUNK_ROWS rows, the last one padded
with zeros, so that a product always has the same shape and a row's bits cannot depend on how many neighbours it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # numba is imported only where it is used
    from stages.compiled.functions import CompiledFunctions

CHUNK_ROWS = 16


def in_chunks(function: Callable[[Tensor], Tensor], x_TI: Tensor) -> Tensor:
    """Apply a row-wise function to chunks of CHUNK_ROWS rows; the result has as many rows as `x_TI`."""
    num_rows = x_TI.shape[0]
    padding = -num_rows % CHUNK_ROWS
    if padding:
        x_TI = F.pad(x_TI, (0, 0, 0, padding))
    # A fresh contiguous copy of each chunk: alignment and strides must not depend on its place either.
    parts = [function(chunk.clone()) for chunk in x_TI.split(CHUNK_ROWS)]
    return torch.cat(parts)[:num_rows] if parts else function(x_TI)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich, 2019), computed in float32 like transformers' Qwen2RMSNorm.

    The scale is rsqrt(|x|² / D + eps): a norm reads bfloat16 rows directly, a mean of squares needs two float32 copies.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        functions: CompiledFunctions | None = None,
    ) -> None:
        super().__init__()
        self._functions = functions
        self.epsilon_1 = torch.tensor([eps], dtype=torch.float32, device=device)
        self._inverse_size = 1.0 / size
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D], same dtype."""
        if self._functions is not None:
            return self._functions.norm(x_TD, self.weight, self.epsilon_1)
        norm_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True, dtype=torch.float32)
        scale_T1 = torch.addcmul(self.epsilon_1, norm_T1, norm_T1, value=self._inverse_size).rsqrt_()
        # Multiplied in float32, rounded to the model's dtype before the weight.
        return torch.mul(x_TD, scale_T1, out=torch.empty_like(x_TD)).mul_(self.weight)


class RotaryEmbedding:
    """Rotary position embedding (Su et al., 2021), half-rotation layout; angles in float32, applied in the model's dtype."""

    def __init__(self, head_dim: int, theta: float, *, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
        self.inv_freq_F = 1.0 / (theta**exponents)

    def angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, and sin with its first half negated, each [T, 1, H] in `dtype`, for int64 positions [T]."""
        freqs_TF = positions_T.float().unsqueeze(-1) * self.inv_freq_F
        cos_TF, sin_TF = freqs_TF.cos().to(dtype), freqs_TF.sin().to(dtype)
        return torch.cat((cos_TF, cos_TF), -1).unsqueeze(1), torch.cat((sin_TF.neg(), sin_TF), -1).unsqueeze(1)


def rotate_(x_TNH: Tensor, cos_T1H: Tensor, signed_sin_T1H: Tensor) -> Tensor:
    """Apply rotary angles to [T, N, H] in place; returns its argument. Angles as RotaryEmbedding gives them.

    Halves change places by one roll, and the sign is in the angles. Products are rounded one by one (no addcmul): then
    bits do not depend on where in a vectorized loop an element falls.
    """
    rolled_TNH = x_TNH.roll(x_TNH.shape[-1] // 2, -1)
    return x_TNH.mul_(cos_T1H).add_(rolled_TNH.mul_(signed_sin_T1H))
