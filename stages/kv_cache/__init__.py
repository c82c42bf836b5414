"""Paged keys and values, and in debug mode tags that say what every slot should hold."""

from stages.kv_cache.paged import KVCache
from stages.kv_cache.tags import KVTags

__all__ = ["KVCache", "KVTags"]
