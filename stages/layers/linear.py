"""Weights of a stage: filled from the checkpoint in its own layout, then turned into the form products run in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from stageline.errors import ConfigError
from stages.layers.products import (
    CompiledGate,
    CompiledProduct,
    CompiledWeight,
    GateProduct,
    PackedGate,
    PackedProduct,
    PlainGate,
    PlainProduct,
    Product,
    WidenedProduct,
    can_pack,
    is_cpu_bfloat16,
)
from stages.layers.quantized import (
    Int4Product,
    Int8Product,
    compiled_weight,
    dequantized_product,
    int4_group_size,
)
from stages.layers.row_independence import rows_are_independent

if TYPE_CHECKING:  # numba is imported only where it is used
    from stages.compiled.functions import CompiledFunctions

Form = TypeVar("Form", Product, GateProduct)


class ProductChooser:
    """Decides the form of every weight of a stage, and remembers what it decided and why.

    In batch-invariant mode a form is taken only if rows are independent in it, tried once per shape on this machine.
    """

    def __init__(
        self,
        *,
        packed: bool,
        batch_invariant: bool,
        quantization: str | None = None,
        functions: CompiledFunctions | None = None,
    ) -> None:
        """`packed=False` multiplies with plain weights by torch; `quantization` is None, int8 or int4."""
        self._quantization = quantization
        self._functions = functions if packed else None
        self._packed, self._batch_invariant = packed, batch_invariant
        self._checked: dict[tuple[str, bool, torch.Size, torch.dtype], bool] = {}
        self._refused: list[str] = []
        self._taken: Counter[str] = Counter()

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None, *, is_head: bool = False) -> Product:
        """The product with one weight. Raises ConfigError where no form is row-independent and it has to be."""
        forms: list[Callable[[], Product]]
        if self._quantization is not None:
            forms = self._quantized(weight_OI, bias_O, self._as_int4(weight_OI, is_head))
        else:
            forms = [lambda: PlainProduct(weight_OI, bias_O)]
            if self._packed and can_pack(weight_OI):
                forms.insert(0, lambda: PackedProduct(weight_OI, bias_O))
            elif self._packed and is_cpu_bfloat16(weight_OI):
                forms.insert(0, lambda: WidenedProduct(weight_OI, bias_O))
        if (compiled := self._compiled(weight_OI, is_head)) is not None:
            forms.insert(0, lambda: CompiledProduct(compiled(), bias_O))
        return self._choose(forms, weight_OI)

    def gate(self, stacked_GI: Tensor) -> GateProduct:
        """The gated product with a stacked weight [2F, I]. Raises as `linear` does."""
        forms: list[Callable[[], GateProduct]]
        if self._quantization is not None:
            quantized = self._quantized(stacked_GI, None, self._as_int4(stacked_GI))
            forms = [lambda form=form: PlainGate(form()) for form in quantized]  # type: ignore[misc]
        else:
            forms = [lambda: PlainGate(PlainProduct(stacked_GI, None))]
            if self._packed and can_pack(stacked_GI):
                forms.insert(0, lambda: PackedGate(stacked_GI))
            elif self._packed and is_cpu_bfloat16(stacked_GI):
                forms.insert(0, lambda: PlainGate(WidenedProduct(stacked_GI, None)))
        if (compiled := self._compiled(stacked_GI)) is not None:
            forms.insert(0, lambda: CompiledGate(compiled()))
        return self._choose(forms, stacked_GI)

    def report(self) -> str:
        """Which forms were taken, and which were refused."""
        taken = ", ".join(f"{count} {name}" for name, count in sorted(self._taken.items()))
        return "; ".join([f"products: {taken}", *self._refused])

    def _as_int4(self, weight_OI: Tensor, is_head: bool = False) -> bool:
        """The head, and what the int4 kernel does not take, are int8 at the least."""
        return self._quantization == "int4" and not is_head and int4_group_size(weight_OI) is not None

    def _quantized(self, weight_OI: Tensor, bias_O: Tensor | None, as_int4: bool) -> list[Callable[[], Product]]:
        """The quantized form and its slow twin."""
        kind = Int4Product if as_int4 else Int8Product
        return [
            lambda: kind(weight_OI, bias_O),
            lambda: dequantized_product(kind(weight_OI, bias_O), bias_O, weight_OI.dtype),
        ]

    def _compiled(self, weight_OI: Tensor, is_head: bool = False) -> Callable[[], CompiledWeight] | None:
        """What makes the weight for a compiled product, where there are such products and they take it."""
        functions, as_int4 = self._functions, self._as_int4(weight_OI, is_head)
        if functions is None or not functions.can_multiply(weight_OI, as_int4=as_int4):
            return None
        if self._quantization is None:
            return lambda: CompiledWeight(functions, weight_OI.contiguous(), None, "compiled")
        return lambda: compiled_weight(functions, weight_OI, as_int4=as_int4)

    def _choose(self, forms: list[Callable[[], Form]], weight_OI: Tensor) -> Form:
        for form in forms:
            product = form()
            if not self._batch_invariant or self._independent(product, weight_OI):
                self._taken[product.name] += 1
                return product
        raise ConfigError(
            "BATCH_INVARIANCE_UNAVAILABLE",
            f"model.batch_invariant: on this machine the bits of a row of a {tuple(weight_OI.shape)} {weight_OI.dtype} "
            "product depend on the rows beside it; use another dtype or number of threads, or switch the mode off",
            field="model.batch_invariant",
        )

    def _independent(self, product: Product | GateProduct, weight_OI: Tensor) -> bool:
        key = (product.name, isinstance(product, PlainGate), weight_OI.shape, weight_OI.dtype)
        if key not in self._checked:
            held = rows_are_independent(product, weight_OI.shape[1], weight_OI.dtype)
            self._checked[key] = held
            if not held:
                self._refused.append(
                    f"the {product.name} product {tuple(weight_OI.shape)} is not row-independent here and is not used"
                )
        return self._checked[key]


class Linear(nn.Module):
    """x @ weight.T + bias; several checkpoint matrices may be stacked in one weight.

    Once every row of the weight and the bias were loaded, the chooser's form of it replaces the plain copy, which is freed: so at
    most the weights being loaded are held in two forms.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        chooser: ProductChooser,
        gated: bool = False,
        is_head: bool = False,
        shared_weight: nn.Parameter | None = None,
    ) -> None:
        """`gated`: the weight is a gate and an up projection, see GateProduct. `shared_weight` is used instead of a new one."""
        super().__init__()
        self._chooser, self._gated, self._is_head = chooser, gated, is_head
        self._rows_to_load = outputs * (2 if bias else 1)
        self.weight = (
            nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device), requires_grad=False)
            if shared_weight is None
            else shared_weight
        )
        self.bias = (
            nn.Parameter(torch.empty(outputs, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        plain = PlainProduct(self.weight, self.bias)
        self.form: Callable[..., Tensor] = PlainGate(plain) if gated else plain

    def forward(self, x_TI: Tensor, *residual_TO: Tensor) -> Tensor:
        """[T, I] → [T, O] (gated: [T, O / 2]), plus a residual where one is given."""
        return self.form(x_TI, *residual_TO)

    def rows_loaded(self, count: int) -> None:
        """Tell that `count` more rows of the weight, or elements of the bias, hold their final values: when all do, and
        not while some are still being read, the form is chosen (and its row independence tried)."""
        self._rows_to_load -= count
        if self._rows_to_load:
            return
        assert self.weight is not None
        weight_OI = self.weight.data
        self.form = (
            self._chooser.gate(weight_OI)
            if self._gated
            else self._chooser.linear(weight_OI, self.bias, is_head=self._is_head)
        )
        self.weight = None  # a plain product keeps its own reference
