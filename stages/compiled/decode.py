"""Decode steps with one call from Python: the compiled functions of all layers, in their order, out of a table of their arguments.

Called one by one they cost a step of the 0.5B 7 to 10 ms of Python beside 35 ms of products: an interpreter whose own memory has
left the caches, for the weights that pass by, is twice as slow as one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from stages.attention.base import AttentionContext
from stages.compiled.calls import CALL_NUMBERS
from stages.compiled.functions import Call, CompiledFunctions
from stages.layers.products import CompiledGate, CompiledProduct

if TYPE_CHECKING:
    from stages.kv_cache import KVCache
    from stages.models.qwen2 import DecoderLayer, Qwen2Stage


class DecodeSteps:
    """The layers of one stage on steps whose rows all decode."""

    def __init__(self, functions: CompiledFunctions, model: Qwen2Stage, kv: KVCache) -> None:
        """The model is loaded, and `possible` for it."""
        self._functions, self._model, self._kv = functions, model, kv
        # What a layer has of its own, whatever the step: found as the numbers in which layers differ.
        ones = torch.ones(1, dtype=torch.int32)
        context = AttentionContext(
            num_decode_rows=1, query_lens=(1,), context_lens=(1,), query_starts_R1=ones, context_lens_R=ones,
            block_tables_RM=ones.unsqueeze(1), positions_T=ones, slots_T=ones,
        )  # fmt: skip
        hidden_TD = torch.empty(1, model.config.hidden_size, dtype=functions.dtype)
        buffers = _Buffers(hidden_TD, (hidden_TD, hidden_TD), model)
        self._table = np.array([self._calls(index, buffers, context) for index in range(len(model.layers))])
        self._own_places = (self._table != self._table[0]).any(0)
        self._own = self._table[:, self._own_places]

    @staticmethod
    def possible(model: Qwen2Stage) -> bool:
        """Whether every layer is made of compiled functions alone."""
        layers = _layers(model)
        products = [product for layer in layers for product in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return model.attention.name == "compiled" and all(
            isinstance(product.form, CompiledProduct | CompiledGate) for product in products
        )

    def run(self, input_T: Tensor, context: AttentionContext) -> Tensor:
        """What `Qwen2Stage.forward` gives."""
        hidden_TD = self._model.embed(input_T)
        if hidden_TD is input_T:
            hidden_TD = hidden_TD.clone(memory_format=torch.contiguous_format)  # the layers write over it
        angles = self._model.rotary.angles(context.positions_T, hidden_TD.dtype)
        buffers = _Buffers(hidden_TD, angles, self._model)  # kept until all calls are made
        self._table[:] = self._calls(0, buffers, context)
        self._table[:, self._own_places] = self._own
        self._functions.run_all(self._table)
        return hidden_TD

    def _calls(self, index: int, buffers: _Buffers, context: AttentionContext) -> list[Call]:
        """Of one layer, each of CALL_NUMBERS; see DecoderLayer and Qwen2Stage.forward."""
        model, functions, config = self._model, self._functions, self._model.config
        layer = _layers(model)[index]
        number = model.layer_range.start_layer + index
        keys_and_values = self._kv.layer(number)
        hidden_TD, normed_TD, wide, heads_TAH, attended_TD, inner_TF = buffers.all
        calls: list[Call] = []

        def multiply(product: Any, x_TI: Tensor, out_TO: Tensor, residual_TO: Tensor | None = None) -> None:
            wide_TI = x_TI
            if wide is not None:
                wide_TI = wide[: x_TI.numel()].view_as(x_TI)
                calls.append(functions.widen_call(x_TI, wide_TI))
            calls.append(functions.multiply_call(wide_TI, product.weight, product.bias_O, residual_TO, out_TO))

        def norm(module: Any) -> None:
            calls.append(functions.norm_call(hidden_TD, module.weight, module.epsilon_1, normed_TD))

        norm(layer.input_norm)
        multiply(layer.qkv.form, normed_TD, heads_TAH.flatten(1))
        calls.append(
            functions.rotate_call(heads_TAH, config.num_heads, buffers.angles, context.slots_T, *keys_and_values)
        )
        calls.append(
            functions.attend_call(
                heads_TAH.narrow(1, 0, config.num_heads), *keys_and_values, context, config.sliding_windows[number],
                attended_TD.unflatten(1, (config.num_heads, config.head_dim)),
            )
        )  # fmt: skip
        multiply(layer.o.form, attended_TD, hidden_TD, hidden_TD)
        norm(layer.post_norm)
        multiply(layer.gate_up.form, normed_TD, inner_TF)
        multiply(layer.down.form, inner_TF, hidden_TD, hidden_TD)
        return [call + [0] * (CALL_NUMBERS - len(call)) for call in calls]


def _layers(model: Qwen2Stage) -> Sequence[DecoderLayer]:
    return cast("Sequence[DecoderLayer]", model.layers)


class _Buffers:
    """What lies between the calls of a step, for every layer the same; the hidden states are written over."""

    def __init__(self, hidden_TD: Tensor, angles: tuple[Tensor, Tensor], model: Qwen2Stage) -> None:
        config, num_tokens = model.config, len(hidden_TD)
        self.angles = angles
        num_heads = config.num_heads + 2 * config.num_kv_heads
        attended_TD = hidden_TD.new_empty((num_tokens, config.num_heads * config.head_dim))
        inner_TF = hidden_TD.new_empty((num_tokens, config.intermediate_size))
        widest = max(hidden_TD.numel(), attended_TD.numel(), inner_TF.numel())
        wide = None if hidden_TD.dtype == torch.float32 else hidden_TD.new_empty(widest, dtype=torch.float32)
        heads_TAH = hidden_TD.new_empty((num_tokens, num_heads, config.head_dim))
        self.all = hidden_TD, torch.empty_like(hidden_TD), wide, heads_TAH, attended_TD, inner_TF
