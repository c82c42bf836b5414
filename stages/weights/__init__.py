"""Streaming a stage's own tensors from a checkpoint into its model."""

from stages.weights.loader import LoadReport, load_weights

__all__ = ["LoadReport", "load_weights"]
