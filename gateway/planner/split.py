"""Cut the decoder layers into stages of equal time."""

from __future__ import annotations

from stageline.errors import ConfigError
from stages.config import ModelConfig
from stages.partition import LayerRange, check_cover, layer_tensor_shapes, parse_layer_ranges


def lm_head_cost_layers(config: ModelConfig) -> float:
    """Cost of `lm_head` in decoder layers, by weights read: both are bound by reading weights in decode."""
    layer = sum(_size(shape) for shape in layer_tensor_shapes(config, 0).values())
    return config.vocab_size * config.hidden_size / layer


def split(config: ModelConfig, num_stages: int) -> tuple[LayerRange, ...]:
    """The contiguous split with the fastest slowest stage; the last stage pays for `lm_head` too.

    Stages before the last are as even as possible, longer ones first. Raises ConfigError where there
    are more stages than layers.
    """
    num_layers = config.num_layers
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            "TOO_MANY_STAGES",
            f"{num_stages} stages need at least as many layers; the model has "
            f"{num_layers}: use 1 to {num_layers} stages",
            field="stages.count",
            value=num_stages,
        )
    if num_stages == 1:
        return (LayerRange(0, num_layers),)
    head = lm_head_cost_layers(config)
    others = num_stages - 1
    # Every other stage keeps at least one layer; among equals the last stage takes as many as it can.
    last = min(range(1, num_layers - others + 1), key=lambda n: (max(-(-(num_layers - n) // others), n + head), -n))
    base, extra = divmod(num_layers - last, others)
    ranges, start = [], 0
    for length in [base + (i < extra) for i in range(others)] + [last]:
        ranges.append(LayerRange(start, start + length))
        start += length
    return tuple(ranges)


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


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
