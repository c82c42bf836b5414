"""Norm and rotary embedding against their formulas written out; and rows that do not depend on their neighbours."""

from __future__ import annotations

import pytest
import torch

from stages.layers.ops import RMSNorm, RotaryEmbedding, rotate_

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def norm_of(size: int, dtype: torch.dtype, eps: float = 1e-6) -> RMSNorm:
    norm = RMSNorm(size, eps, dtype=dtype, device=CPU)
    norm.weight.data.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return norm


@DTYPES
@pytest.mark.parametrize("size", [896, 42, 1])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@torch.inference_mode()
def test_norm_is_the_mean_of_squares(size: int, scale: float, dtype: torch.dtype) -> None:
    norm = norm_of(size, dtype)
    x_TD = (torch.randn(17, size, generator=torch.Generator().manual_seed(2)) * scale).to(dtype)
    before_TD = x_TD.clone()
    x64_TD = x_TD.double()
    exact_TD = norm.weight.double() * x64_TD / (x64_TD.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    got_TD = norm(x_TD)
    assert got_TD.dtype == dtype
    assert torch.equal(x_TD, before_TD)  # it works in place on its own copy only
    eps = torch.finfo(dtype).eps  # two roundings to dtype: up to one eps; and float32's on the way
    torch.testing.assert_close(got_TD.double(), exact_TD, rtol=1.01 * eps + 4e-7, atol=0)


@DTYPES
@torch.inference_mode()
def test_norm_of_zeros_is_zero(dtype: torch.dtype) -> None:
    assert not norm_of(896, dtype)(torch.zeros(3, 896, dtype=dtype)).any()


def transformers_rotation(x_TNH: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """Qwen2's rotate_half, one product at a time in the model's dtype: the slow twin."""
    head_dim = x_TNH.shape[-1]
    inverse_F = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles_TF = positions_T.float().unsqueeze(-1) * inverse_F
    angles_T1H = torch.cat((angles_TF, angles_TF), -1).unsqueeze(1)
    left, right = x_TNH.chunk(2, -1)
    turned_TNH = torch.cat((-right, left), -1)
    return x_TNH * angles_T1H.cos().to(x_TNH.dtype) + turned_TNH * angles_T1H.sin().to(x_TNH.dtype)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 6, 2])
@pytest.mark.parametrize("tokens", [1, 3, 200])
@torch.inference_mode()
def test_rotation_in_place_has_the_twins_bits(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    theta, heads = 1e6, 18
    qkv_TAH = torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    positions_T = torch.arange(tokens) * 163 % 32_768
    twin_TNH = transformers_rotation(qkv_TAH[:, :16], positions_T, theta)
    values_TKH = qkv_TAH[:, 16:].clone()
    cos, signed_sin = RotaryEmbedding(head_dim, theta, device=CPU).angles(positions_T, dtype)
    rotate_(qkv_TAH.narrow(1, 0, 16), cos, signed_sin)
    assert torch.equal(qkv_TAH[:, :16], twin_TNH)
    assert torch.equal(qkv_TAH[:, 16:], values_TKH)  # the values beside them are left alone


@DTYPES
@torch.inference_mode()
def test_a_row_has_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    norm, rotary = norm_of(896, dtype), RotaryEmbedding(64, 1e6, device=CPU)
    x_TD = torch.randn(150, 896, generator=generator).to(dtype)
    heads_TNH = torch.randn(150, 16, 64, generator=generator).to(dtype)
    positions_T = torch.randint(0, 32_768, (150,), generator=generator)
    normed_TD = norm(x_TD)
    turned_TNH = rotate_(heads_TNH.clone(), *rotary.angles(positions_T, dtype))
    for row in range(150):
        assert torch.equal(norm(x_TD[row : row + 1].clone())[0], normed_TD[row])
        alone = rotate_(heads_TNH[row : row + 1].clone(), *rotary.angles(positions_T[row : row + 1], dtype))
        assert torch.equal(alone[0], turned_TNH[row])
