"""Attention over a paged KV cache: an interface, the portable oracle, a batch-invariant one, and FlashAttention."""

from stages.attention.base import AttentionBackend, AttentionContext
from stages.attention.factory import make_attention

__all__ = ["AttentionBackend", "AttentionContext", "make_attention"]
