"""Choosing tokens from what the last stage returned."""

from gateway.sampling.choose import Choice, choose, make_sampling

__all__ = ["Choice", "choose", "make_sampling"]
