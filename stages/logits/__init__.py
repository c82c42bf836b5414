"""From logits to candidates: mask, bias, penalties, temperature, top K, one draw from the tail."""

from stages.logits.processor import LogitsProcessor

__all__ = ["LogitsProcessor"]
