"""Hidden states in 8 bits: near what they were, each token alone, and nothing hidden that was not a number."""

from __future__ import annotations

import pytest
import torch

from stageline.errors import ConfigError
from stages.hidden_states import HiddenStateCodec
from stages.spec import StageSpec

WIDTH = 200
ERROR = {"fp8": 2**-4, "int8": 0.5 / 127}  # half a step: relative to the number, relative to the token's largest


def through(hidden_TD: torch.Tensor, reduced: str | None) -> torch.Tensor:
    codec = HiddenStateCodec(hidden_TD.dtype, hidden_TD.shape[1], reduced)
    payload = codec.encode(hidden_TD)
    assert len(payload) == codec.num_bytes(len(hidden_TD))
    wire = torch.frombuffer(bytearray(payload.numpy().tobytes()), dtype=torch.uint8)
    return codec.decode(wire, len(hidden_TD))


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Of very different sizes, with outliers, as real hidden states have."""
    hidden_TD = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden_TD[:, 7] *= 300
    return (hidden_TD * torch.logspace(-6, 4, 64).unsqueeze(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduced", ["fp8", "int8"])
def test_each_number_is_off_by_half_a_step_at_most(reduced: str, dtype: torch.dtype) -> None:
    hidden_TD = tokens(dtype)
    back_TD = through(hidden_TD, reduced)
    assert back_TD.dtype == dtype
    wide_TD, largest_T1 = hidden_TD.float(), hidden_TD.float().abs().amax(1, keepdim=True)
    difference_TD, rounding = (back_TD.float() - wide_TD).abs(), torch.finfo(dtype).eps
    if reduced == "int8":
        allowed_TD = largest_T1 * ERROR["int8"] + wide_TD.abs() * rounding
    else:  # below 2^-6 of the scaled range the steps stay 2^-9
        allowed_TD = wide_TD.abs() * (ERROR["fp8"] + rounding) + largest_T1 / 448 * 2**-10
    assert (difference_TD <= allowed_TD * 1.001).all()
    assert difference_TD.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_reduced_type_nothing_changes(dtype: torch.dtype) -> None:
    assert torch.equal(through(tokens(dtype), None), tokens(dtype))


@pytest.mark.parametrize("reduced", ["fp8", "int8"])
@pytest.mark.parametrize("width", [1, 5, 200, 1023])
def test_a_tokens_bits_do_not_depend_on_its_neighbours(reduced: str, width: int) -> None:
    hidden_TD = torch.randn(37, width, generator=torch.Generator().manual_seed(2)).bfloat16()
    together_TD = through(hidden_TD, reduced)
    for token in range(len(hidden_TD)):
        assert torch.equal(through(hidden_TD[token : token + 1], reduced)[0], together_TD[token])
    assert torch.equal(through(hidden_TD[5:20], reduced), together_TD[5:20])


@pytest.mark.parametrize("reduced", ["fp8", "int8"])
def test_zeros_stay_and_what_is_no_number_is_told_of_that_token_alone(reduced: str) -> None:
    hidden_TD = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    clean_TD = through(hidden_TD, reduced)
    hidden_TD[1] = 0
    hidden_TD[2, 9], hidden_TD[3, 9], hidden_TD[4] = float("nan"), float("inf"), 1e-42
    back_TD = through(hidden_TD, reduced)
    assert torch.equal(back_TD[1], torch.zeros(WIDTH))
    assert back_TD[2].isnan().all()
    assert not back_TD[3].isfinite().any()
    assert back_TD[4].abs().max() <= 2e-42
    assert torch.equal(back_TD[[0, 5]], clean_TD[[0, 5]])


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(ConfigError, match="hidden_dtype must be one of fp8, int8"):
        StageSpec(model="m", start_layer=0, end_layer=1, hidden_dtype="fp4")
