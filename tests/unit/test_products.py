"""Packed products against their plain twin; what loading frees; and the check that rows are independent."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from stageline.errors import ConfigError
from stages.layers import linear as linear_module
from stages.layers import products as products_module
from stages.layers.linear import Linear, ProductChooser
from stages.layers.ops import CHUNK_ROWS
from stages.layers.products import (
    BLOCK_ELEMENTS,
    PackedGate,
    PackedProduct,
    PlainGate,
    PlainProduct,
    WidenedProduct,
    can_pack,
)
from stages.layers.row_independence import rows_are_independent
from tests.stage_chain import Chain
from tests.tiny import save_tiny, tiny_model

needs_packing = pytest.mark.skipif(
    not can_pack(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 products on this CPU"
)
PACKED_DTYPES = [pytest.param(torch.bfloat16, marks=needs_packing), torch.float32]
# (inputs, outputs): the 0.5B's, tiny and odd ones.
SHAPES = [(896, 1152), (896, 896), (4864, 896), (64, 128), (42, 154), (77, 42), (1, 2)]
ROWS = [1, 2, 3, 16, 17, 40]
CPU = torch.device("cpu")


def tensors(inputs: int, outputs: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(inputs + 31 * outputs + rows)
    shapes = (outputs, inputs), (outputs,), (rows, inputs), (rows, outputs)
    weight, bias, x, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(t.to(dtype) for t in (weight * inputs**-0.5, bias, x, residual))


def close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Within a few roundings of values of up to 4 to the dtype; a lost bias or a wrong row is off by one or more."""
    rtol, atol = (2**-6, 2**-5) if got.dtype == torch.bfloat16 else (2**-18, 2**-17)
    torch.testing.assert_close(got.float(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_packed_products_agree_with_plain_and_with_float32(
    inputs: int, outputs: int, rows: int, dtype: torch.dtype
) -> None:
    weight, bias, x, residual = tensors(inputs, outputs, rows, dtype)
    exact = x.float() @ weight.float().T
    for product in (PackedProduct(weight, bias), PlainProduct(weight, bias)):
        assert product(x).dtype == dtype
        close(product(x), exact + bias.float())
        close(product(x, residual), exact + bias.float() + residual.float())
    close(PackedProduct(weight, None)(x, residual), exact + residual.float())
    gate, up = exact.chunk(2, dim=-1)
    for gated in (PackedGate(weight), PlainGate(PlainProduct(weight, None))):
        close(gated(x), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_widened_products_agree_with_plain_and_with_float32(inputs: int, outputs: int, rows: int, monkeypatch) -> None:
    weight, bias, x, residual = tensors(inputs, outputs, rows)
    exact = x.float() @ weight.float().T
    for block_elements in (BLOCK_ELEMENTS, 5 * inputs, 1):  # one block, a last one that is smaller, and rows one by one
        monkeypatch.setattr(products_module, "BLOCK_ELEMENTS", block_elements)
        product = WidenedProduct(weight, bias)
        close(product(x), exact + bias.float())
        close(product(x, residual), exact + bias.float() + residual.float())
        close(WidenedProduct(weight, None)(x, residual), exact + residual.float())
        gate, up = exact.chunk(2, dim=-1)
        close(PlainGate(WidenedProduct(weight, None))(x), torch.nn.functional.silu(gate) * up)


def test_a_widened_product_computes_in_and_out_of_inference_mode_and_on_any_thread() -> None:
    weight, bias, x, _ = tensors(64, 128, 16)
    product = WidenedProduct(weight, bias)
    results = []

    def compute() -> None:
        with torch.inference_mode():
            results.append(product(x))
        results.append(product(x))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compute()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("form", [pytest.param("packed", marks=needs_packing), "widened"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fast_model_agrees_with_its_plain_twin(tied: bool, form: str, tmp_path, monkeypatch) -> None:
    if form == "widened":
        monkeypatch.setattr(linear_module, "can_pack", lambda weight: False)
    folder = save_tiny(tmp_path / "model", tiny_model(tie_word_embeddings=tied))
    rows = [(i, [(7 * i + 3 * j) % 380 for j in range(length)], length) for i, length in enumerate((1, 1, 9, 30))]
    for cuts in ([0, 4], [0, 1, 4]):
        fast_chain = Chain(folder, cuts, dtype=torch.bfloat16)
        plain = Chain(folder, cuts, dtype=torch.bfloat16, packed_weights=False)
        exact = Chain(folder, cuts, dtype=torch.float32)
        assert form in fast_chain.stages[-1].model.products.report()
        assert form not in plain.stages[-1].model.products.report()
        logits = [chain.step(rows) for chain in (fast_chain, plain, exact)]
        for sequence in range(len(rows)):
            fast, slow, truth = (x[sequence] for x in logits)
            spread = (slow - truth).norm() / truth.norm()
            assert (fast - truth).norm() / truth.norm() < 1.5 * spread + 1e-3


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_packing_frees_the_plain_weights(dtype: torch.dtype) -> None:
    """8 weights of 32 or 64 MiB: packed as each is complete, so they are never all there twice."""
    chooser, size, peak = ProductChooser(packed=True, batch_invariant=False), 4096 * 4096 * dtype.itemsize, 0
    before = resident_bytes()
    layers = [Linear(4096, 4096, bias=False, dtype=dtype, device=CPU, chooser=chooser) for _ in range(8)]
    for layer in layers:
        assert layer.weight is not None
        for start in (0, 2048):
            layer.weight.data.narrow(0, start, 2048).fill_(0.5)
            layer.rows_loaded(2048)
        assert layer.weight is None
        peak = max(peak, resident_bytes() - before)
    assert peak < 10 * size
    assert resident_bytes() - before < 9 * size


def test_a_tied_head_is_packed_beside_the_plain_embedding(tmp_path) -> None:
    chain = Chain(save_tiny(tmp_path / "m", tiny_model(tie_word_embeddings=True)), [0, 4], dtype=torch.bfloat16)
    model = chain.stages[0].model
    assert model.lm_head.weight is None
    assert model.embedding is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_rows_of_real_products_are_independent(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias, *_ = tensors(inputs, outputs, 1, dtype)
    assert rows_are_independent(PlainProduct(weight, bias), inputs, dtype)
    if can_pack(weight):
        assert rows_are_independent(PackedProduct(weight, bias), inputs, dtype)
        assert rows_are_independent(PackedGate(weight), inputs, dtype)
    if dtype == torch.bfloat16:
        assert rows_are_independent(WidenedProduct(weight, bias), inputs, dtype)


class RowDependent:
    """A product in which one row in one position gets other bits than elsewhere."""

    name = "packed"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._plain = PlainProduct(weight, bias)

    def __call__(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        out = self._plain(x, *residual).clone()
        if len(out) == CHUNK_ROWS:
            out[7] *= 1 + 2**-7
        return out


class NeighbourDependent(RowDependent):
    """A product whose row 5 changes its bits where some other row is large."""

    def __call__(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        out = self._plain(x, *residual).clone()
        if (x.abs() > 500).any():
            out *= 1 + 2**-7
        return out


class SoundGate(PlainGate):
    """Stands for the packed one on a CPU for which oneDNN packs nothing."""

    def __init__(self, stacked_GI: torch.Tensor) -> None:
        super().__init__(PlainProduct(stacked_GI, None))
        self.name = "packed"


@pytest.mark.parametrize("broken", [RowDependent, NeighbourDependent])
def test_a_row_dependent_product_is_refused_and_the_plain_one_serves(broken, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(linear_module, "PackedProduct", broken)
    monkeypatch.setattr(linear_module, "PackedGate", SoundGate)
    monkeypatch.setattr(linear_module, "can_pack", lambda weight: True)
    folder = save_tiny(tmp_path / "m")
    rows = [(0, [1, 2, 3], 3)]
    chain = Chain(folder, [0, 4], dtype=torch.bfloat16, batch_invariant=True)
    report = chain.stages[0].model.products.report()
    assert "the packed product (64, 64) is not row-independent here and is not used" in report
    assert f"{4 * 3 + 1} plain" in report, "QKV, output and down projections of four layers, and the head"
    assert torch.isfinite(chain.step(rows)[0]).all()
    ordinary = Chain(folder, [0, 4], dtype=torch.bfloat16).stages[0].model.products.report()
    assert "refused" not in ordinary
    assert "plain" not in ordinary, "only the batch-invariant mode needs the property"


def test_without_any_row_independent_product_the_mode_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(linear_module, "PlainProduct", RowDependent)
    chooser = ProductChooser(packed=False, batch_invariant=True)
    with pytest.raises(ConfigError) as caught:
        chooser.linear(torch.randn(8, 4), None)
    assert caught.value.reason == "BATCH_INVARIANCE_UNAVAILABLE"
    assert "(8, 4)" in caught.value.message


def test_the_check_waits_for_the_bias() -> None:
    """Another thread may be reading it meanwhile, and what is there before is garbage."""
    chooser = ProductChooser(packed=True, batch_invariant=True)
    layer = Linear(64, 32, bias=True, dtype=torch.bfloat16, device=CPU, chooser=chooser)
    layer.bias.data.fill_(torch.nan)
    layer.weight.data.normal_()
    layer.rows_loaded(32)
    assert layer.weight is not None, "no form was chosen yet"
    layer.bias.data.normal_()
    layer.rows_loaded(32)
    assert layer.weight is None
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all()
