"""Products by a compiled function against the same in float64, and the models that multiply with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.compiled import functions as compiled
from stages.compiled.functions import CompiledFunctions
from stages.compiled.products import ROW_BLOCK, STREAMS
from stages.compiled.tiles import GROUP, LANES
from stages.layers.linear import ProductChooser
from stages.layers.products import CompiledGate, CompiledProduct, CompiledWeight
from stages.layers.quantized import Int4Product, Int8Product, compiled_weight
from stages.layers.row_independence import rows_are_independent
from tests.parity.test_model import reference
from tests.stage_chain import Chain
from tests.tiny import save_tiny, tiny_model


def plain(functions: CompiledFunctions, weight: torch.Tensor) -> CompiledWeight:
    return CompiledWeight(functions, weight, None, "compiled")


@contextmanager
def in_threads(wanted: bool) -> Iterator[None]:
    before, compiled.PARALLEL_ELEMENTS = compiled.PARALLEL_ELEMENTS, 1 if wanted else 1 << 40
    try:
        yield
    finally:
        compiled.PARALLEL_ELEMENTS = before


@settings(max_examples=150)
@given(data=st.data())
def test_products_agree_with_float64(data: st.DataObject, functions) -> None:
    ours, dtype = functions
    inputs = LANES * data.draw(st.integers(1, 20))
    outputs = 2 * STREAMS * data.draw(st.one_of(st.integers(1, 6), st.integers(30, 60)))
    num_rows = data.draw(st.one_of(st.integers(0, 20), st.integers(ROW_BLOCK - 1, 2 * ROW_BLOCK + 7)))
    with_bias, with_residual, threads = (data.draw(st.booleans()) for _ in range(3))
    generator = torch.Generator().manual_seed(inputs + outputs + num_rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight, x = drawn(outputs, inputs), drawn(num_rows, inputs)
    bias = drawn(outputs) if with_bias else None
    residual = drawn(num_rows, outputs) if with_residual else None
    with in_threads(threads):
        got = CompiledProduct(plain(ours, weight), bias)(x, residual)
        gated = CompiledGate(plain(ours, weight))(x)
    exact = x.double() @ weight.double().T
    gate, up = exact.chunk(2, 1)
    exact_gated = torch.nn.functional.silu(gate) * up
    for extra in (bias, residual):
        exact = exact if extra is None else exact + extra.double()
    assert got.dtype == gated.dtype == dtype
    eps = torch.finfo(dtype).eps
    # float32 sums of `inputs` products of about 1; a gated value is a product of two of them.
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=1e-6 * inputs)
    torch.testing.assert_close(gated.double(), exact_gated, rtol=eps, atol=1e-5 * inputs)


def test_a_row_has_the_same_bits_among_any_rows(functions) -> None:
    """Also in other tiles: in each row of a step of 1 to 8 the sums are taken in the same order."""
    ours, dtype = functions
    torch.manual_seed(0)
    weight, x = torch.randn(96, 10 * LANES).to(dtype), torch.randn(8, 10 * LANES).to(dtype)
    for product in (CompiledProduct(plain(ours, weight), torch.randn(96).to(dtype)), CompiledGate(plain(ours, weight))):
        assert rows_are_independent(product, 10 * LANES, dtype)
        alone = torch.cat([product(x[row : row + 1]) for row in range(8)])
        for num_rows in range(2, 9):
            assert torch.equal(product(x[:num_rows]), alone[:num_rows])


def test_weights_in_part_of_a_tensor_and_rows_that_are_not_side_by_side(functions) -> None:
    ours, dtype = functions
    torch.manual_seed(0)
    wide, x = torch.randn(64, 2 * LANES).to(dtype), torch.randn(5, 4 * LANES).to(dtype)
    expected = x[:, ::2].double() @ wide[16:48].double().T
    got = CompiledProduct(plain(ours, wide[16:48]), None)(x[:, ::2])
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@settings(max_examples=100)
@given(data=st.data())
def test_quantized_products_agree_with_what_they_stand_for(data: st.DataObject, functions) -> None:
    """The slow twin is the weight that torch's kernel multiplies with, in float64."""
    ours, dtype = functions
    as_int4 = data.draw(st.booleans())
    inputs = GROUP * data.draw(st.integers(1, 5)) if as_int4 else LANES * data.draw(st.integers(1, 20))
    outputs = 2 * STREAMS * data.draw(st.integers(1, 12))
    num_rows = data.draw(st.one_of(st.integers(0, 8), st.integers(ROW_BLOCK - 1, ROW_BLOCK + 7)))
    generator = torch.Generator().manual_seed(inputs + outputs + num_rows)
    shapes = (outputs, inputs), (outputs,), (num_rows, inputs), (num_rows, outputs)
    weight, bias, x, residual = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    with in_threads(data.draw(st.booleans())):
        made = compiled_weight(ours, weight, as_int4=as_int4)
        got = CompiledProduct(made, bias)(x, residual)
        gated = CompiledGate(made)(x)
    twin = (Int4Product if as_int4 else Int8Product)(weight, None).dequantized().double()
    exact = x.double() @ twin.T
    gate, up = exact.chunk(2, 1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact + bias.double() + residual.double(), rtol=eps, atol=1e-5 * inputs)
    torch.testing.assert_close(gated.double(), torch.nn.functional.silu(gate) * up, rtol=eps, atol=1e-4 * inputs)


def test_what_is_not_finite_stays_so_and_in_its_row(functions) -> None:
    ours, dtype = functions
    torch.manual_seed(0)
    weight, x = torch.randn(32, LANES).to(dtype), torch.randn(4, LANES).to(dtype)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    for product in (CompiledProduct(plain(ours, weight), None), CompiledGate(plain(ours, weight))):
        finite = product(x).isfinite().all(1)
        assert finite.tolist() == [True, False, False, True]
    x[2, 0] = torch.finfo(dtype).max  # overflows to infinities, whose sigmoid is 0 or 1
    assert not CompiledGate(plain(ours, weight))(x)[2].isnan().all()


def test_what_oneDNN_is_faster_at_or_does_not_fit_is_left_to_torch(functions, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, dtype = functions
    weight = torch.randn(4 * STREAMS, 2 * LANES).to(dtype)
    for faster, chosen in ((lambda _: False, True), (lambda _: True, False)):
        monkeypatch.setattr(compiled, "onednn_is_faster", faster)
        chooser = ProductChooser(packed=True, batch_invariant=False, functions=ours)
        chooser.linear(weight, None)
        chooser.gate(weight)
        assert ("products: 2 compiled" in chooser.report()) == chosen
    monkeypatch.setattr(compiled, "onednn_is_faster", lambda _: False)
    for wrong in (weight[:-1], weight[:, :-1], weight[:STREAMS]):
        assert not ours.can_multiply(wrong)
    chooser = ProductChooser(packed=False, batch_invariant=False, functions=ours)
    chooser.linear(weight, None)
    assert "1 plain" in chooser.report()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_model_says_what_transformers_says(tmp_path, everywhere, batch_invariant: bool) -> None:
    model = tiny_model()
    chain = Chain(save_tiny(tmp_path, model), [0, 1, 4], batch_invariant=batch_invariant)
    for stage in chain.stages:
        assert "compiled" in stage.report().partition("products: ")[2]
        assert "plain" not in stage.report().partition("products: ")[2]
    prompts = [[5, 77, 300, 12, 9, 9, 41], [1], list(range(1, 90))]
    assert chain.generate(prompts, 20) == [reference(model, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_model_says_what_torchs_kernels_say(tmp_path, everywhere, quantization) -> None:
    folder = save_tiny(tmp_path, tiny_model(hidden_size=128, intermediate_size=192))
    ours, torchs = (Chain(folder, [0, 2, 4], quantization=quantization, compiled=wanted) for wanted in (True, False))
    assert f"compiled {quantization}" in ours.stages[0].report()
    assert ours.stages[0]._decode is not None
    rows = [[(0, [5, 9, 200, 31, 7], 5), (1, [8] * 9, 9)], [(0, [3], 6), (1, [4], 10)]]
    for step in rows:
        got, expected = ours.step(step), torchs.step(step)
        for sequence in got:
            torch.testing.assert_close(got[sequence], expected[sequence], rtol=0, atol=5e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bfloat16_model_is_as_near_to_float32_as_its_plain_twin(tied: bool, everywhere, tmp_path) -> None:
    folder = save_tiny(tmp_path / "model", tiny_model(tie_word_embeddings=tied))
    rows = [(i, [(7 * i + 3 * j) % 380 for j in range(length)], length) for i, length in enumerate((1, 1, 9, 30))]
    fast_chain = Chain(folder, [0, 1, 4], dtype=torch.bfloat16)
    plain = Chain(folder, [0, 1, 4], dtype=torch.bfloat16, packed_weights=False, compiled=False)
    exact = Chain(folder, [0, 1, 4])
    logits = [chain.step(rows) for chain in (fast_chain, plain, exact)]
    for sequence in range(len(rows)):
        fast, slow, truth = (x[sequence] for x in logits)
        spread = (slow - truth).norm() / truth.norm()
        assert (fast - truth).norm() / truth.norm() < 1.5 * spread + 1e-3
