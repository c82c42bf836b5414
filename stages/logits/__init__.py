"""From logits to candidates: mask, bias, penalties, temperature, top K, one draw from the tail. And to the log-probabilities of
known tokens."""

from stages.logits.check import check_sampling, check_scoring
from stages.logits.processor import LogitsProcessor
from stages.logits.scoring import Scorer

__all__ = ["LogitsProcessor", "Scorer", "check_sampling", "check_scoring"]
