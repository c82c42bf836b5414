"""Choosing tokens from what the last stage returned."""

from gateway.sampling.choose import Choice, choose, choose_rows, make_sampling

__all__ = ["Choice", "choose", "choose_rows", "make_sampling"]
