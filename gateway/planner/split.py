"""Cut the decoder layers into stages: one pure function over what a stage costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stageline.errors import ConfigError
from stages.config import ModelConfig
from stages.partition import LayerRange, check_cover, layer_tensor_shapes, parse_layer_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage of n layers costs on its device: `fixed_s + n · layer_s` seconds a micro-batch, and memory.

    `fixed_*` is what does not depend on n: embedding, final norm, `lm_head`. `memory_bytes` is what the device has
    for weights and KV cache; None where memory plays no part.
    """

    layer_s: float
    fixed_s: float = 0.0
    memory_bytes: int | None = None
    layer_bytes: int = 0
    fixed_bytes: int = 0
    kv_layer_bytes_per_token: int = 1

    def seconds(self, num_layers: int) -> float:
        """Time of a micro-batch."""
        return self.fixed_s + num_layers * self.layer_s

    def kv_tokens(self, num_layers: int) -> float:
        """Tokens of KV cache beside `num_layers` layers; not over 0 where the weights do not fit."""
        if self.memory_bytes is None:
            return math.inf
        free = self.memory_bytes - self.fixed_bytes - num_layers * self.layer_bytes
        return free / (num_layers * self.kv_layer_bytes_per_token)


def cut(
    num_layers: int, costs: Sequence[StageCost], *, min_tokens: float = 0.0, wanted_tokens: float = 0.0
) -> list[int]:
    """Layers of each stage, in order: the fastest slowest stage, then the largest KV cache.

    A slower slowest stage is taken only as far as it takes to hold `wanted_tokens` of KV cache, or as many as can be
    had; every stage holds at least `min_tokens`. Where memory plays no part, stages are as even in time as they can be,
    longer ones first. Returns an empty list where the model does not fit. Needs at least as many layers as stages.
    """
    assert 1 <= len(costs) <= num_layers
    longest = [
        max((n for n in range(1, num_layers + 1) if cost.kv_tokens(n) >= min_tokens), default=0) for cost in costs
    ]
    if min(longest) < 1 or sum(longest) < num_layers:
        return []
    even = _deal(num_layers, longest, key=lambda i, n: costs[i].seconds(n))
    fastest = _slowest(costs, even)
    if all(cost.memory_bytes is None for cost in costs):
        return even
    # Every time that a stage can have bounds one candidate; the first that holds what is wanted wins.
    limits = sorted(
        {t for i, c in enumerate(costs) for n in range(1, longest[i] + 1) if (t := c.seconds(n)) >= fastest}
    )
    best: list[int] = []
    best_tokens = -math.inf
    for limit in limits:
        within = [_most_layers(cost, limit, top) for cost, top in zip(costs, longest, strict=True)]
        # Largest KV cache first; among equals the stage that stays faster.
        lengths = _deal(num_layers, within, key=lambda i, n: (-costs[i].kv_tokens(n), costs[i].seconds(n)))
        tokens = min(cost.kv_tokens(n) for cost, n in zip(costs, lengths, strict=True))
        if tokens > best_tokens:
            best, best_tokens = lengths, tokens
        if tokens >= wanted_tokens:
            break
    return best


def _deal(num_layers: int, longest: Sequence[int], key: Callable[[int, int], Any]) -> list[int]:
    """One layer at a time to the stage where `key(stage, length after)` is least: optimal for the worst stage, since
    what a stage costs only grows with its length."""
    lengths = [1] * len(longest)
    for _ in range(num_layers - len(longest)):
        open_stages = (i for i, length in enumerate(lengths) if length < longest[i])
        lengths[min(open_stages, key=lambda i: (key(i, lengths[i] + 1), i))] += 1
    return lengths


def _most_layers(cost: StageCost, limit_s: float, longest: int) -> int:
    return max((n for n in range(1, longest + 1) if cost.seconds(n) <= limit_s), default=1)


def _slowest(costs: Sequence[StageCost], lengths: Sequence[int]) -> float:
    return max(cost.seconds(n) for cost, n in zip(costs, lengths, strict=True))


PRODUCTS_SHARE = 0.75
"""Of a decoder layer's time in a step, what multiplying with its weights takes (benchmarks/kernels.py: 0.69 to 0.86); the rest is
attention, norms and copies. `lm_head` is nearly all product."""


def to_ranges(lengths: Sequence[int]) -> tuple[LayerRange, ...]:
    """Lengths → consecutive half-open ranges from layer 0."""
    ranges, start = [], 0
    for length in lengths:
        ranges.append(LayerRange(start, start + length))
        start += length
    return tuple(ranges)


def lm_head_cost_layers(config: ModelConfig) -> float:
    """Cost of `lm_head` in decoder layers: by weights read, to which products are bound in decode."""
    layer = sum(math.prod(shape) for shape in layer_tensor_shapes(config, 0).values())
    return PRODUCTS_SHARE * config.vocab_size * config.hidden_size / layer


def check_num_stages(num_stages: int, num_layers: int) -> None:
    """Raise ConfigError where there are more stages than layers."""
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            "TOO_MANY_STAGES",
            f"{num_stages} stages need at least as many layers; the model has "
            f"{num_layers}: use 1 to {num_layers} stages",
            field="stages.count",
            value=num_stages,
        )


def split(config: ModelConfig, num_stages: int) -> tuple[LayerRange, ...]:
    """The contiguous split over equal devices with the fastest slowest stage; the last stage pays for `lm_head` too.

    Raises ConfigError where there are more stages than layers.
    """
    check_num_stages(num_stages, config.num_layers)
    head = lm_head_cost_layers(config)
    costs = [StageCost(layer_s=1.0, fixed_s=head if i == num_stages - 1 else 0.0) for i in range(num_stages)]
    return to_ranges(cut(config.num_layers, costs))


def resolve_layers(config: ModelConfig, num_stages: int | None, layers: str | None) -> tuple[LayerRange, ...]:
    """The ranges a user asked for: explicit `layers`, checked, or a split into `num_stages`.

    Raises ConfigError for ranges that do not cover the model exactly once, or whose number is not `num_stages`.
    """
    if layers is None:
        return split(config, num_stages or 1)
    ranges = parse_layer_ranges(layers)
    check_cover(ranges, config.num_layers)
    if num_stages is not None and num_stages != len(ranges):
        raise ConfigError(
            "STAGES_LAYERS_DIFFER",
            f"--stages {num_stages} but --layers {layers} names {len(ranges)} ranges",
            field="stages.layers",
            value=layers,
        )
    return ranges
