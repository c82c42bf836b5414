"""What a stage is: a half-open range of decoder layers, and the tensors it holds. No torch here.

Tensor names and shapes are those of the Hugging Face checkpoint of Qwen2 (`model.layers.{i}.self_attn.q_proj.weight`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stageline.errors import ConfigError
from stages.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Decoder layers `[start_layer, end_layer)`."""

    start_layer: int
    end_layer: int

    def __len__(self) -> int:
        return self.end_layer - self.start_layer

    def __str__(self) -> str:
        return f"{self.start_layer}-{self.end_layer}"

    def is_first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.start_layer == 0

    def is_last(self, config: ModelConfig) -> bool:
        """Whether this stage holds the final norm and `lm_head`."""
        return self.end_layer == config.num_layers


def parse_layer_ranges(text: str) -> tuple[LayerRange, ...]:
    """Parse `0-9,9-18` (half-open, one range a stage). Raises ConfigError where a range is not `start-end`."""
    ranges = []
    for part in text.split(","):
        start, dash, end = part.strip().partition("-")
        if not (dash and start.isascii() and start.isdigit() and end.isascii() and end.isdigit()):
            raise ConfigError(
                "LAYERS_NOT_RANGES",
                f"layers {text!r}: {part!r} is not a half-open range like 0-12",
                field="stages.layers",
                value=text,
            )
        ranges.append(LayerRange(int(start), int(end)))
    return tuple(ranges)


def check_cover(ranges: Sequence[LayerRange], num_layers: int) -> None:
    """Raise ConfigError unless the ranges are not empty, in order, and cover `[0, num_layers)` exactly once."""
    shown = ",".join(map(str, ranges))
    expected = 0
    for index, layers in enumerate(ranges):
        if layers.start_layer >= layers.end_layer:
            raise ConfigError(
                "LAYERS_EMPTY",
                f"layers {shown}: stage {index} ({layers}) holds no layer; ranges are half-open",
                field="stages.layers",
                stage=index,
            )
        if layers.start_layer != expected:
            fault = "overlaps the stage before it" if layers.start_layer < expected else "leaves a gap"
            raise ConfigError(
                "LAYERS_OVERLAP" if layers.start_layer < expected else "LAYERS_GAP",
                f"layers {shown}: stage {index} ({layers}) {fault}; it must start at layer {expected}",
                field="stages.layers",
                stage=index,
                expected_start=expected,
            )
        expected = layers.end_layer
    if expected != num_layers:
        raise ConfigError(
            "LAYERS_GAP" if expected < num_layers else "LAYERS_OUT_OF_RANGE",
            f"layers {shown}: the last stage ends at layer {expected}, the model has {num_layers} layers",
            field="stages.layers",
            expected_end=num_layers,
        )


def layer_tensor_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of the checkpoint tensors of one decoder layer."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    if config.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def tensor_shapes(config: ModelConfig, layers: LayerRange) -> dict[str, tuple[int, ...]]:
    """Name → shape of every checkpoint tensor a stage reads.

    With tied embeddings the last stage reads the embedding too (it is its `lm_head`), so a pipeline of several
    stages holds it twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    last = layers.is_last(config)
    if layers.is_first() or (last and config.tie_word_embeddings):
        shapes[EMBEDDING] = (config.vocab_size, config.hidden_size)
    for layer in range(layers.start_layer, layers.end_layer):
        shapes |= layer_tensor_shapes(config, layer)
    if last:
        shapes[FINAL_NORM] = (config.hidden_size,)
        if not config.tie_word_embeddings:
            shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def num_parameters(config: ModelConfig, layers: LayerRange) -> int:
    """Parameters a stage holds (a tied embedding counts on each stage that holds it)."""
    return sum(math.prod(shape) for shape in tensor_shapes(config, layers).values())


def kv_bytes_per_token(config: ModelConfig, layers: LayerRange, dtype_bytes: int) -> int:
    """Bytes of keys and values one token occupies on this stage."""
    return 2 * len(layers) * config.num_kv_heads * config.head_dim * dtype_bytes
