"""int8 and int4 products against their dequantized twins, how near they are to the weights, and models made of them."""

from __future__ import annotations

import pytest
import torch

from stageline.errors import ConfigError
from stages.layers import linear as linear_module
from stages.layers.linear import ProductChooser
from stages.layers.quantized import Int4Product, Int8Product, dequantized_product, int4_group_size
from stages.partition import LayerRange
from stages.runner import StageRunner
from stages.spec import StageSpec
from tests.stage_chain import Chain
from tests.tiny import save_tiny, tiny_model

SHAPES = [(896, 1152), (1216, 96), (64, 128), (96, 64)]
DTYPES = [torch.float32, torch.bfloat16]
PROMPT = [(17 * i * i + 5) % 380 + 1 for i in range(30)]


def weight_and_rows(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(inputs + 31 * outputs + rows)
    shapes = (outputs, inputs), (outputs,), (rows, inputs), (rows, outputs)
    weight, bias, x, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(t.to(dtype) for t in (weight * inputs**-0.5, bias, x, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 15, 16, 40])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("kind", [Int8Product, Int4Product])
def test_a_product_agrees_with_its_dequantized_twin(kind, inputs, outputs, rows, dtype) -> None:
    weight, bias, x, residual = weight_and_rows(inputs, outputs, rows, dtype)
    product = kind(weight, bias)
    exact = x.float() @ product.dequantized().T + bias.float()
    twin = dequantized_product(product, bias.float(), torch.float32)
    torch.testing.assert_close(twin(x.float()), exact, rtol=1e-4, atol=1e-4)
    tolerance = 2e-4 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(product(x).float(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(product(x, residual).float(), exact + residual.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "levels"), [(Int8Product, 127), (Int4Product, 7.5)])
def test_a_weight_is_off_by_half_a_level_at_most(kind, levels, dtype) -> None:
    weight = weight_and_rows(896, 1152, 1, dtype)[0]
    off = (kind(weight, None).dequantized() - weight.float()).abs().max()
    half_level = weight.float().abs().max() / levels / 2
    assert 0.1 * half_level < off <= half_level * (1.001 if dtype == torch.float32 else 1.2)


@pytest.mark.parametrize("kind", [Int8Product, Int4Product])
def test_rows_of_zeros_stay_zero(kind) -> None:
    product = kind(torch.zeros(32, 64), None)
    assert torch.equal(product(torch.randn(2, 64)), torch.zeros(2, 32))


def test_what_the_int4_kernel_does_not_take_is_int8() -> None:
    assert int4_group_size(torch.empty(64, 96)) == 32
    assert int4_group_size(torch.empty(64, 40)) is None
    assert int4_group_size(torch.empty(40, 64)) is None
    chooser = ProductChooser(packed=True, batch_invariant=False, quantization="int4")
    names = [chooser.linear(torch.randn(64, inputs), None, is_head=head).name
             for inputs, head in ((64, False), (40, False), (64, True))]  # fmt: skip
    assert names == ["int4", "int8", "int8"]
    assert chooser.report() == "products: 1 int4, 2 int8"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_has_the_same_bits_in_any_split(tied, dtype, quantization, tmp_path) -> None:
    folder = save_tiny(tmp_path / "model", tiny_model(tie_word_embeddings=tied))
    one, three, plain = (
        Chain(folder, cuts, dtype=dtype, quantization=kind).step([(0, PROMPT, len(PROMPT))])[0]
        for cuts, kind in (([0, 4], quantization), ([0, 1, 3, 4], quantization), ([0, 4], None))
    )
    assert torch.equal(one, three)
    near = torch.nn.functional.cosine_similarity(one, plain, dim=0)
    assert not torch.equal(one, plain)
    assert near > (0.995 if quantization == "int8" else 0.8)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_model_in_batch_invariant_mode(quantization, tmp_path) -> None:
    folder = save_tiny(tmp_path / "model")
    chain = Chain(folder, [0, 4], dtype=torch.bfloat16, quantization=quantization, batch_invariant=True)
    alone = chain.step([(0, PROMPT, len(PROMPT))])[0]
    chain.step([(1, [5, 6, 7], 3), (2, PROMPT[:11], 11)])
    assert torch.equal(chain.step([(1, [9], 4), (2, PROMPT[11:], len(PROMPT))])[2], alone)


def test_a_kernel_whose_rows_depend_on_each_other_gives_way_to_its_twin(monkeypatch) -> None:
    class Mixing(Int4Product):
        def __call__(self, x_TI, residual_TO=None):
            return super().__call__(x_TI, residual_TO) + x_TI.mean()

    monkeypatch.setattr(linear_module, "Int4Product", Mixing)
    chooser = ProductChooser(packed=True, batch_invariant=True, quantization="int4")
    weight = torch.randn(64, 64)
    product = chooser.linear(weight, None)
    assert product.name == "dequantized int4"
    assert torch.equal(product(torch.eye(64)).T, Int4Product(weight, None).dequantized())
    assert "int4 product (64, 64) is not row-independent" in chooser.report()


def test_wrong_requests_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="quantization must be one of int8, int4"):
        StageSpec(model="m", start_layer=0, end_layer=1, quantization="int3")
    config = Chain(save_tiny(tmp_path / "model"), [0, 4]).stages[0].config
    with pytest.raises(ConfigError, match="runs on the CPU alone") as caught:
        StageRunner(config, LayerRange(0, 4), dtype=torch.bfloat16, device=torch.device("cuda"), quantization="int8")
    assert caught.value.reason == "QUANTIZATION_DEVICE"
