"""Attention for CPUs: decode rows by a compiled function, prompts as the portable backend computes them."""

from __future__ import annotations

from torch import Tensor

from stages.attention.base import AttentionContext
from stages.attention.portable import PortableAttention
from stages.compiled.functions import CompiledFunctions


class CompiledAttention(PortableAttention):
    """The portable backend with another way for decode rows."""

    name = "compiled"

    def __init__(self, functions: CompiledFunctions) -> None:
        self._functions = functions

    def _decode(
        self, q_RNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        return self._functions.attend(q_RNH, keys_BSKH, values_BSKH, context, window)
