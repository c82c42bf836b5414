"""Qwen2 (Yang et al., 2024), the part of it that one stage holds. Llama from GGUF is the same without QKV biases.

T tokens, D hidden size, F feed-forward size, N query heads, K KV heads, H head size, V vocabulary, R rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.attention.base import AttentionBackend, AttentionContext
from stages.config import ModelConfig
from stages.kv_cache import KVCache
from stages.layers.linear import Linear, ProductChooser
from stages.layers.ops import RMSNorm, RotaryEmbedding, in_chunks, rotate_
from stages.partition import EMBEDDING, FINAL_NORM, LM_HEAD, LayerRange, tensor_shapes

if TYPE_CHECKING:  # numba is imported only where it is used
    from stages.compiled.functions import CompiledFunctions


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms; Q, K and V are one product, gate and up another."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chooser: ProductChooser,
        functions: CompiledFunctions | None,
    ) -> None:
        super().__init__()
        make: Any = {"dtype": dtype, "device": device}
        norm: Any = {**make, "functions": functions}
        products: Any = {**make, "chooser": chooser}
        self.q_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        self.input_norm = RMSNorm(hidden, config.rms_norm_eps, **norm)
        self.qkv = Linear(hidden, self.q_size + 2 * self.kv_size, bias=config.qkv_bias, **products)
        self.o = Linear(self.q_size, hidden, bias=False, **products)
        self.post_norm = RMSNorm(hidden, config.rms_norm_eps, **norm)
        self.gate_up = Linear(hidden, 2 * inner, bias=False, gated=True, **products)
        self.down = Linear(inner, hidden, bias=False, **products)

    def project(self, hidden_TD: Tensor) -> Tensor:
        """Queries, keys and values of each token, side by side: [T, (N + 2K)·H]."""
        qkv: Tensor = self.qkv(self.input_norm(hidden_TD))
        return qkv

    def finish(self, hidden_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """Output projection, residual, and the SwiGLU MLP (Shazeer, 2020)."""
        hidden_TD = self.o(attended_TD, hidden_TD)
        out_TD: Tensor = self.down(self.gate_up(self.post_norm(hidden_TD)), hidden_TD)
        return out_TD


class Qwen2Stage(nn.Module):
    """Layers `[start_layer, end_layer)`; the first stage embeds, the last one has the final norm and `lm_head`."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: AttentionBackend,
        batch_invariant: bool = False,
        packed_weights: bool = True,
        quantization: str | None = None,
        functions: CompiledFunctions | None = None,
    ) -> None:
        """`packed_weights=False` has torch multiply with the checkpoint's layout: the slow twin, as torch's operators without `functions`
        are. In batch-invariant mode `functions` are taken for products alone."""
        super().__init__()
        make: Any = {"dtype": dtype, "device": device}
        self.products = ProductChooser(
            packed=packed_weights, batch_invariant=batch_invariant, quantization=quantization, functions=functions
        )
        functions = None if batch_invariant else functions
        self.config, self.layer_range, self.attention = config, layers, attention
        self._functions = functions
        self.batch_invariant = batch_invariant
        self.is_first, self.is_last = layers.is_first(), layers.is_last(config)
        parts: Any = {**make, "chooser": self.products, "functions": functions}
        self.layers = nn.ModuleList(DecoderLayer(config, **parts) for _ in range(len(layers)))
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, device=device)
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(vocabulary, **make), requires_grad=False) if self.is_first else None
        self.lm_head: Linear | None = None
        if self.is_last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, functions=functions, **make)
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, bias=False, chooser=self.products, is_head=True, **make,
                shared_weight=self.embedding if config.tie_word_embeddings else None,
            )  # fmt: skip
        self._expected = tensor_shapes(config, layers)
        self._missing = set(self._expected)

    def embed(self, input_T: Tensor) -> Tensor:
        """See `forward`: the hidden states [T, D] that the layers begin with."""
        return F.embedding(input_T, self.embedding) if self.embedding is not None and self.is_first else input_T

    def forward(self, input_T: Tensor, context: AttentionContext, kv: KVCache) -> Tensor:
        """int64 token ids [T] on the first stage, hidden states [T, D] on the others → hidden states [T, D]."""
        hidden_TD = self.embed(input_T)
        angles_T1H = self.rotary.angles(context.positions_T, hidden_TD.dtype)
        config = self.config
        head_sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        for index, layer in enumerate(self.layers, start=self.layer_range.start_layer):
            assert isinstance(layer, DecoderLayer)
            heads_TAH = self._by_row(layer.project, hidden_TD).unflatten(-1, (-1, config.head_dim))
            q_TNH, k_TKH, v_TKH = heads_TAH.split(head_sizes, 1)
            if self._functions is not None:
                self._functions.run(
                    self._functions.rotate_call(
                        heads_TAH, config.num_heads, angles_T1H, context.slots_T, *kv.layer(index)
                    )
                )
            else:
                rotate_(heads_TAH.narrow(1, 0, config.num_heads + config.num_kv_heads), *angles_T1H)
                kv.write(index, context.slots_T, k_TKH, v_TKH)
            attended_TNH = self.attention.forward(q_TNH, *kv.layer(index), context, self.config.sliding_windows[index])
            attended_TD = attended_TNH.flatten(1)
            hidden_TD = self._finish(layer, hidden_TD, attended_TD)
        return hidden_TD

    def compute_logits(self, hidden_RD: Tensor) -> Tensor:
        """Final norm and `lm_head` for R rows: float32 logits [R, V]. Last stage only."""
        assert self.lm_head is not None
        head = self.lm_head
        return self._by_row(lambda x: head(self.norm(x)).float(), hidden_RD)

    def _finish(self, layer: DecoderLayer, hidden_TD: Tensor, attended_TD: Tensor) -> Tensor:
        if not self.batch_invariant:
            return layer.finish(hidden_TD, attended_TD)
        width = hidden_TD.shape[1]

        def finish(both: Tensor) -> Tensor:
            return layer.finish(both[:, :width].contiguous(), both[:, width:].contiguous())

        return in_chunks(finish, torch.cat((hidden_TD, attended_TD), dim=1))

    def _by_row(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return in_chunks(function, x) if self.batch_invariant else function(x)

    def target(self, name: str) -> Tensor:
        """Where a checkpoint tensor is to be written (a slice of a fused weight, or a tensor of its own); see WeightSink."""
        assert name in self._missing, (
            f"tensor {name} does not belong to layers {self.layer_range}, or was loaded already"
        )
        return self._place(name)[0]

    def loaded(self, name: str) -> None:
        """A target holds its tensor. A weight that is complete takes the form its products run in."""
        target, owner = self._place(name)
        self._missing.remove(name)
        if owner is not None:
            owner.rows_loaded(len(target))

    def missing(self) -> set[str]:
        """Names of checkpoint tensors that were not loaded yet."""
        return set(self._missing)

    def _place(self, name: str) -> tuple[Tensor, Linear | None]:
        """Where a checkpoint tensor goes, and the product whose rows it fills."""
        if name == EMBEDDING:
            head = self.lm_head if self.config.tie_word_embeddings else None
            if self.embedding is not None:
                return self.embedding.data, head  # which shares it
            assert head is not None
            return _plain(head), head
        if name == FINAL_NORM:
            return self.norm.weight.data, None
        if name == LM_HEAD:
            assert self.lm_head is not None
            return _plain(self.lm_head), self.lm_head
        _, _, index, rest = name.split(".", 3)
        layer = self.layers[int(index) - self.layer_range.start_layer]
        assert isinstance(layer, DecoderLayer)
        module, _, kind = rest.rpartition(".")
        q, kv, inner = layer.q_size, layer.kv_size, self.config.intermediate_size
        fused, start, length = {
            "input_layernorm": (layer.input_norm, 0, None),
            "post_attention_layernorm": (layer.post_norm, 0, None),
            "self_attn.q_proj": (layer.qkv, 0, q),
            "self_attn.k_proj": (layer.qkv, q, kv),
            "self_attn.v_proj": (layer.qkv, q + kv, kv),
            "self_attn.o_proj": (layer.o, 0, None),
            "mlp.gate_proj": (layer.gate_up, 0, inner),
            "mlp.up_proj": (layer.gate_up, inner, inner),
            "mlp.down_proj": (layer.down, 0, None),
        }[module]
        parameter: Tensor = getattr(fused, kind).data
        part = parameter if length is None else parameter[start : start + length]
        return part, fused if isinstance(fused, Linear) else None


def _plain(linear: Linear) -> Tensor:
    assert linear.weight is not None, "loaded before its last row came"
    return linear.weight.data
