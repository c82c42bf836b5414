"""Paged keys and values."""

from stages.kv_cache.paged import KVCache

__all__ = ["KVCache"]
