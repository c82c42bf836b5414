"""The one generate path behind every door: sequences in, deltas out, over any number of pipelines."""

from gateway.engine.engine import Engine
from gateway.engine.settings import EngineSettings

__all__ = ["Engine", "EngineSettings"]
