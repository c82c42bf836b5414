"""Row chunks, norms, rotary embeddings. Shapes: T tokens, D hidden size, I inputs, N heads, H head size.

Batch-invariant mode: everything that acts on a token alone runs in chunks of exactly CHUNK_ROWS rows, the last one padded
with zeros, so that a product always has the same shape and a row's bits cannot depend on how many neighbours it has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """Root mean square norm (Zhang & Sennrich, 2019), computed in float32 like transformers' Qwen2RMSNorm."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D], same dtype."""
        x32_TD = x_TD.float()
        variance_T1 = x32_TD.pow(2).mean(-1, keepdim=True)
        return self.weight * (x32_TD * torch.rsqrt(variance_T1 + self.eps)).to(x_TD.dtype)


class RotaryEmbedding:
    """Rotary position embedding (Su et al., 2021), half-rotation layout; angles in float32, applied in the model's dtype."""

    def __init__(self, head_dim: int, theta: float, *, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
        self.inv_freq_F = 1.0 / (theta**exponents)

    def angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, H] in `dtype`, for int64 positions [T]."""
        freqs_TF = positions_T.float().unsqueeze(-1) * self.inv_freq_F
        angles_TH = torch.cat((freqs_TF, freqs_TF), dim=-1)
        return angles_TH.cos().to(dtype).unsqueeze(1), angles_TH.sin().to(dtype).unsqueeze(1)


def rotate(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Apply rotary angles to [T, N, H]."""
    left, right = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos_T1H + torch.cat((-right, left), dim=-1) * sin_T1H
