"""From logits to candidates: mask, bias, penalties, temperature, top K, one draw from the tail."""

from stages.logits.check import check_sampling
from stages.logits.processor import LogitsProcessor

__all__ = ["LogitsProcessor", "check_sampling"]
