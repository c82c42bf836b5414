"""Choosing tokens from what the last stage returned, and reading what it says of known ones."""

from gateway.sampling.choose import Choice, choose, choose_rows, make_sampling, place_sampling
from gateway.sampling.scores import scored_tokens

__all__ = ["Choice", "choose", "choose_rows", "make_sampling", "place_sampling", "scored_tokens"]
