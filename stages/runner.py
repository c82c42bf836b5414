"""Runs micro-batches through a stage's layers: batch in, hidden states or logits out. No gRPC inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stageline.errors import ConfigError
from stages.attention import AttentionContext, make_attention
from stages.attention.portable import PortableAttention
from stages.attention.self_check import self_check
from stages.batch import StepBatch
from stages.compiled.choice import compiled_functions, decode_steps
from stages.config import ModelConfig
from stages.graphs import DecodeGraphs, Recorder
from stages.kv_cache import KVCache, KVTags
from stages.models.qwen2 import Qwen2Stage
from stages.partition import LayerRange, kv_bytes_per_token
from stages.transfers import transfers_for

if TYPE_CHECKING:  # numba is imported only where it is used
    from stages.compiled.decode import DecodeSteps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights and hidden states are computed in, by name; StageSpec's `dtype`."""

SCORED_AT_ONCE = 128
"""Tokens whose logits are there together while a prompt is scored: 78 MB at a vocabulary of 152,064. Many enough that reading
`lm_head` for them costs less than multiplying with it."""


class StageRunner:
    """The layers of one stage, their weights and their KV cache, on one device."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_invariant: bool = False,
        block_size_tokens: int = 16,
        packed_weights: bool = True,
        compiled: bool = True,
        debug_kv: bool = False,
        quantization: str | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`packed_weights=False` keeps weights in the checkpoint's layout: the slow twin of the CPU's packed products.
        `compiled=False` keeps torch's operators: the slow twin of the CPU's compiled functions.
        `debug_kv` tags every KV slot and checks the tags of all that a row reads (slow).
        `quantization` is None, int8 or int4 (weights only). Raises ConfigError where the device has no kernel for it.
        `recorder` makes graphs of decode steps, where the attention backend can be recorded."""
        if quantization is not None and device.type != "cpu":
            raise ConfigError(
                "QUANTIZATION_DEVICE",
                f"model.quantization {quantization} runs on the CPU alone, and this stage is on {device}",
                field="model.quantization",
            )
        self.config, self.layers, self.dtype, self.device = config, layers, dtype, device
        self.block_size_tokens, self.quantization = block_size_tokens, quantization
        self.transfers = transfers_for(device)
        functions, refused = None, ""
        if compiled:
            functions, refused = compiled_functions(
                config, layers, dtype=dtype, device=device, block_size_tokens=block_size_tokens
            )
        attention = make_attention(
            device=device,
            dtype=dtype,
            block_size_tokens=block_size_tokens,
            batch_invariant=batch_invariant,
            functions=functions,
        )
        self.attention_report = f"{attention.name}; {refused}" if refused else attention.name
        if attention.name in ("varlen", "compiled"):
            check = self_check(
                attention,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size_tokens=block_size_tokens,
                dtype=dtype,
                device=device,
            )
            self.attention_report = check.detail
            if not check.passed:
                attention = PortableAttention()
                self.attention_report += "; using the portable backend"
        self._recorder = recorder if attention.tensors_only else None
        self._graphs: DecodeGraphs | None = None
        self.model = Qwen2Stage(
            config,
            layers,
            dtype=dtype,
            device=device,
            attention=attention,
            batch_invariant=batch_invariant,
            packed_weights=packed_weights,
            quantization=quantization,
            functions=functions,
        )
        self._kv: KVCache | None = None
        self._functions = functions
        self._decode: DecodeSteps | None = None
        self._debug_kv = debug_kv
        self._tags: KVTags | None = None

    def kv_capacity_blocks(self, memory_bytes: int) -> int:
        """KV blocks that fit in `memory_bytes`."""
        block = kv_bytes_per_token(self.config, self.layers, self.dtype.itemsize) * self.block_size_tokens
        return max(0, memory_bytes // block - self._num_spare_blocks)

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV cache; one of the same size is kept, since every slot is written before it is read."""
        self._tags = KVTags(num_blocks, self.block_size_tokens) if self._debug_kv else None
        if self._kv is None or self._kv.num_blocks != num_blocks:
            self._kv = self._graphs = self._decode = None  # free the old one first
            self._kv = KVCache(
                self.config,
                self.layers,
                num_blocks=num_blocks,
                block_size_tokens=self.block_size_tokens,
                dtype=self.dtype,
                device=self.device,
                spare_blocks=self._num_spare_blocks,
            )
            if self._recorder is not None:
                self._graphs = DecodeGraphs(self.model, self._kv, self._recorder, dtype=self.dtype, device=self.device)
            if self._functions is not None:
                self._decode = decode_steps(self._functions, self.model, self._kv)

    @property
    def _num_spare_blocks(self) -> int:
        """KV blocks beside the pipeline's."""
        return 0 if self._recorder is None else 1

    @property
    def num_blocks(self) -> int:
        """KV blocks allocated; 0 before `allocate_kv`."""
        return self._kv.num_blocks if self._kv is not None else 0

    def report(self) -> str:
        """How this stage computes, and what was refused on this machine: attention, and the products loaded so far."""
        graphs = "" if self._recorder is None else "; decode steps as CUDA graphs"
        return f"attention: {self.attention_report}{graphs}; {self.model.products.report()}"

    @torch.inference_mode()
    def execute(
        self, batch: StepBatch, hidden_TD: Tensor | None, on_scored: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Run the layers. Token ids come from the batch on the first stage, `hidden_TD` [T, D] on the others.

        Returns hidden states [T, D] in the stage's dtype, or on the last stage float32 logits [R, V] for
        `batch.output_rows`, in their order; `on_scored` gets those of `batch.scored_tokens` in pieces: the place of the
        first among the scored tokens, and float32 logits [S', V] which it may change. Raises InternalError
        (KV_TAG_MISMATCH) with `debug_kv`.
        """
        assert self._kv is not None, "allocate_kv comes before execute"
        if self._tags is not None:
            self._tags.write(batch)
            self._tags.check(batch)
        assert (hidden_TD is None) == self.model.is_first
        given: np.ndarray | Tensor = batch.token_ids.astype(np.int64) if hidden_TD is None else hidden_TD
        fresh, last_tokens, scored, input_T, *arrays = self.transfers.to_device(
            (batch.fresh_blocks, batch.last_tokens, batch.scored_tokens, given, *batch.attention_arrays)
        )
        if len(fresh):
            self._kv.clear(fresh)
        context = AttentionContext.from_batch(batch, arrays)
        if self._graphs is not None and self._graphs.takes(context):
            hidden_TD = self._graphs.run(input_T, context)
        elif self._decode is not None and context.only_decodes:
            hidden_TD = self._decode.run(input_T, context)
        else:
            hidden_TD = self.model(input_T, context, self._kv)
        if not self.model.is_last:
            return hidden_TD.contiguous()
        if on_scored is not None:
            for start in range(0, len(scored), SCORED_AT_ONCE):
                places_S = scored[start : start + SCORED_AT_ONCE]
                on_scored(start, self.model.compute_logits(hidden_TD.index_select(0, places_S)))
        return self.model.compute_logits(hidden_TD.index_select(0, last_tokens))
