"""FlashAttention over paged keys and values through torch.nn.attention.varlen. Not yet run on a GPU.

Without the external FA3 package this is FlashAttention-2, whose page size must be a multiple of 256. Its paged split-KV
is wrong or NaN (pytorch#194167), so num_splits is 1 everywhere. Decode and prefill rows go in separate calls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from stageline.errors import ConfigError
from stages.attention.base import AttentionContext

PAGE_MULTIPLE_TOKENS = 256


class VarlenAttention:
    """The CUDA backend."""

    name = "varlen"
    tensors_only = True

    def __init__(self, *, block_size_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ConfigError for what the kernel would compute wrongly instead of refusing."""
        if device.type != "cuda":
            raise ConfigError(
                "ATTENTION_DEVICE", f"varlen attention needs a CUDA device, got {device}", field="stages.device"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                "ATTENTION_DTYPE", f"varlen attention needs bfloat16 or float16, got {dtype}", field="model.dtype"
            )
        if block_size_tokens % PAGE_MULTIPLE_TOKENS:
            raise ConfigError(
                "ATTENTION_PAGE_SIZE",
                f"varlen attention needs kv_cache.block_size_tokens in multiples of {PAGE_MULTIPLE_TOKENS}, got {block_size_tokens}",
                field="kv_cache.block_size_tokens",
                value=block_size_tokens,
            )

    def forward(
        self, q_TNH: Tensor, keys_BSKH: Tensor, values_BSKH: Tensor, context: AttentionContext, window: int | None
    ) -> Tensor:
        """See AttentionBackend."""
        for tensor in (context.query_starts_R1, context.context_lens_R, context.block_tables_RM):
            assert tensor.dtype == torch.int32
            assert tensor.device.type == "cuda"
        rows, decode = len(context.query_lens), context.num_decode_rows
        parts = []
        for q, start, end in zip(
            q_TNH.split([decode, q_TNH.shape[0] - decode]), (0, decode), (decode, rows), strict=True
        ):
            if start < end:
                parts.append(self._call(q, keys_BSKH, values_BSKH, context, start, end, window))
        return torch.cat(parts)

    def _call(
        self,
        q_TNH: Tensor,
        keys_BSKH: Tensor,
        values_BSKH: Tensor,
        context: AttentionContext,
        start: int,
        end: int,
        window: int | None,
    ) -> Tensor:
        # `narrow` rather than brackets: see portable.py. Decode rows come first and have one token each, so a part's
        # first token is `start` of the batch in both calls.
        starts_R1 = context.query_starts_R1.narrow(0, start, end - start + 1) - start
        lengths_R = context.context_lens_R.narrow(0, start, end - start)
        ends_R1 = torch.nn.functional.pad(lengths_R.cumsum(0, dtype=torch.int32), (1, 0))
        result = varlen_attn(
            q_TNH,
            keys_BSKH,
            values_BSKH,
            starts_R1,
            ends_R1,
            max(context.query_lens[start:end]),
            max(context.context_lens[start:end]),
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=lengths_R,
            block_table=context.block_tables_RM.narrow(0, start, end - start),
            num_splits=1,
        )
        assert isinstance(result, Tensor)
        return result
