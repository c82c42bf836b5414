"""What each stage of a plan holds and how many tokens fit beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.config import ModelConfig
from stages.partition import LayerRange, kv_bytes_per_token, num_parameters

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. `kv_capacity_tokens` is 0 where the weights do not fit."""

    index: int
    layers: str
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A split with its sizes. `kv_capacity_tokens` is the least of the stages: one block table serves them all."""

    stages: tuple[StagePlan, ...]
    parameters: int
    kv_capacity_tokens: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_plan(
    config: ModelConfig,
    ranges: Sequence[LayerRange],
    *,
    dtype: str,
    gpu_memory_bytes: int,
    usable_fraction: float,
    block_size_tokens: int,
) -> Plan:
    """Sizes of a split on GPUs of `gpu_memory_bytes`, of which `usable_fraction` goes to weights and KV cache.

    `parameters` counts a tied embedding once though the last stage holds a second copy.
    """
    stages = []
    for index, layers in enumerate(ranges):
        parameters = num_parameters(config, layers)
        weight_bytes = parameters * DTYPE_BYTES[dtype]
        per_token = kv_bytes_per_token(config, layers, DTYPE_BYTES[dtype])
        free = max(0, int(gpu_memory_bytes * usable_fraction) - weight_bytes)
        tokens = free // (per_token * block_size_tokens) * block_size_tokens
        stages.append(StagePlan(index, str(layers), parameters, weight_bytes, per_token, tokens))
    capacity = min(stage.kv_capacity_tokens for stage in stages)
    return Plan(
        stages=tuple(stages),
        parameters=num_parameters(config, LayerRange(0, config.num_layers)),
        kv_capacity_tokens=capacity,
        fits=capacity > 0,
    )
