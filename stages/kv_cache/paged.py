"""Keys and values of a stage's layers in blocks of a fixed number of tokens. B blocks, S slots of a block, K KV heads."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.config import ModelConfig
from stages.partition import LayerRange


class KVCache:
    """One [B, S, K, H] tensor for keys and one for values of each layer."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        *,
        num_blocks: int,
        block_size_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        spare_blocks: int = 0,
    ) -> None:
        """`spare_blocks` come after the others and belong to nobody."""
        shape = (num_blocks + spare_blocks, block_size_tokens, config.num_kv_heads, config.head_dim)
        # Zeros, not garbage: reads past a row's context are masked out, but NaN times zero is NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(len(layers))]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(len(layers))]
        self._first = layers.start_layer
        self.num_blocks, self.spare_blocks = num_blocks, spare_blocks
        self.block_size_tokens = block_size_tokens

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer of the model, each [B, S, K, H]."""
        return self._keys[layer - self._first], self._values[layer - self._first]

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks (int64 ids) in all layers: a new owner must not read what the last one left behind it."""
        for cache in (*self._keys, *self._values):
            cache.index_fill_(0, blocks, 0)

    def write(self, layer: int, slots_T: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Store the keys and values of T tokens at int64 slots [T] (block · S + offset)."""
        keys, values = self.layer(layer)
        keys.flatten(0, 1).index_copy_(0, slots_T, k_TKH)
        values.flatten(0, 1).index_copy_(0, slots_T, v_TKH)
