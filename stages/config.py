"""The architecture of a model, read from its `config.json`. No torch here: the gateway and the planner import it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.errors import CheckpointError
from stages.config_values import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_ROPE_THETA,
    MAX_WIDTH,
    ConfigReader,
    check_integer,
    check_number,
    invalid,
    shorten,
)

# Keys that say nothing about the function the model computes (training, bookkeeping, or read elsewhere).
_IGNORED_KEYS = frozenset(
    [
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "pad_token_id",
        "initializer_range",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "name_or_path",
        "auto_map",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "is_encoder_decoder",
        "_attn_implementation",
    ]
)
_READ_KEYS = frozenset(
    [
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Qwen2 family (or Llama's, from GGUF: the same function without QKV biases).

    `sliding_windows` has one entry a layer: None for full attention, else the number of positions a query sees,
    itself included. `eos_token_ids` come from `config.json`; `generation_config.json` may add more.
    """

    architecture: str  # "qwen2" | "llama"
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    sliding_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, high in (
            ("hidden_size", MAX_WIDTH),
            ("intermediate_size", MAX_WIDTH),
            ("num_layers", MAX_LAYERS),
            ("num_heads", MAX_WIDTH),
            ("num_kv_heads", MAX_WIDTH),
            ("head_dim", MAX_WIDTH),
            ("vocab_size", MAX_WIDTH),
            ("max_position_embeddings", MAX_POSITIONS),
        ):
            check_integer(name, getattr(self, name), high=high)
        check_number("rms_norm_eps", self.rms_norm_eps, low=0, high=1)
        check_number("rope_theta", self.rope_theta, low=0, high=MAX_ROPE_THETA)
        if self.num_heads % self.num_kv_heads:
            raise invalid(
                "num_key_value_heads", self.num_kv_heads, f"a divisor of the {self.num_heads} attention heads"
            )
        if self.head_dim % 2:
            raise invalid("head_dim", self.head_dim, "even, for rotary embeddings")
        if len(self.sliding_windows) != self.num_layers:
            raise invalid("layer_types", self.sliding_windows, f"one entry for each of the {self.num_layers} layers")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Build from a parsed Qwen2 `config.json`; `source` is named in errors.

        Raises CheckpointError for another architecture, an unknown key, or a value this project does not compute
        exactly (rope scaling, quantization, another activation).
        """
        architectures = data.get("architectures")
        if data.get("model_type") != "qwen2" or architectures not in (None, [], ["Qwen2ForCausalLM"]):
            raise CheckpointError(
                "UNKNOWN_ARCHITECTURE",
                f"{source}: model_type {shorten(data.get('model_type'))} with architectures {shorten(architectures)} "
                "is not served; expected model_type 'qwen2' with Qwen2ForCausalLM",
                model_type=shorten(data.get("model_type")),
                architectures=shorten(architectures),
                source=source,
            )
        unknown = sorted(data.keys() - _IGNORED_KEYS - _READ_KEYS)
        if unknown:
            raise CheckpointError(
                "UNKNOWN_CONFIG_KEY",
                f"{source}: unknown key {', '.join(map(repr, unknown))}: it could change what the model computes; "
                "remove it if it does not",
                keys=",".join(unknown),
                source=source,
            )
        missing = sorted(
            {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} - data.keys()
        )
        if missing:
            raise CheckpointError(
                "CONFIG_KEY_MISSING",
                f"{source}: missing key {', '.join(missing)}",
                keys=",".join(missing),
                source=source,
            )
        read = ConfigReader(data, source)
        if data.get("hidden_act", "silu") != "silu":
            raise read.invalid("hidden_act", "'silu'")
        if data.get("quantization_config") is not None:
            raise read.invalid("quantization_config", "absent (quantized checkpoints are not served; use the original)")
        hidden_size = read.integer("hidden_size", high=MAX_WIDTH)
        num_heads = read.integer("num_attention_heads", high=MAX_WIDTH)
        num_layers = read.integer("num_hidden_layers", high=MAX_LAYERS)
        vocab_size = read.integer("vocab_size", high=MAX_WIDTH)
        head_dim = read.optional_integer("head_dim", high=MAX_WIDTH)
        if head_dim is None:
            if hidden_size % num_heads:
                raise read.invalid("num_attention_heads", f"a divisor of hidden_size ({hidden_size})")
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise invalid("head_dim", head_dim, "even, for rotary embeddings", source)
        num_kv_heads = read.optional_integer("num_key_value_heads", high=MAX_WIDTH) or num_heads
        if num_heads % num_kv_heads:
            raise read.invalid("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
        return cls(
            architecture="qwen2",
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size", high=MAX_WIDTH),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, low=0, high=1),
            rope_theta=_rope_theta(read, data, source),
            max_position_embeddings=read.integer("max_position_embeddings", 32768, high=MAX_POSITIONS),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=True,
            sliding_windows=_sliding_windows(read, data, num_layers),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
        )

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a `config.json`. Raises CheckpointError where it is missing, not JSON, or not served."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                "CONFIG_MISSING", f"{path} does not exist; a model folder needs a config.json", path=path
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError("CONFIG_UNREADABLE", f"{path} cannot be read as JSON: {error}", path=path) from None
        if not isinstance(data, dict):
            raise CheckpointError(
                "CONFIG_UNREADABLE",
                f"{path} must hold a JSON object, got {shorten(data)}",
                path=path,
                value=shorten(data),
            )
        return cls.from_dict(data, source=str(path))


def _rope_theta(read: ConfigReader, data: Mapping[str, Any], source: str) -> float:
    """The rotary base; transformers 5 writes it into `rope_parameters`, earlier versions beside `rope_scaling`."""
    parameters, scaling = read.optional_object("rope_parameters"), read.optional_object("rope_scaling")
    theta = read.number("rope_theta", 10000.0, low=0, high=MAX_ROPE_THETA)
    for name, values in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        kinds = [values.pop(key) for key in ("rope_type", "type") if key in values]
        inner = values.pop("rope_theta", None)
        if values or any(kind not in (None, "default") for kind in kinds):
            raise read.invalid(
                name, "without rotary scaling (remove it and keep prompts within max_position_embeddings)"
            )
        if inner is not None:
            inner = check_number(f"{name}.rope_theta", inner, low=0, high=MAX_ROPE_THETA, source=source)
            if "rope_theta" in data and inner != theta:
                raise invalid(f"{name}.rope_theta", inner, f"the same as rope_theta ({theta:g})", source)
            theta = inner
    return theta


def _sliding_windows(read: ConfigReader, data: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer (transformers: layers from `max_window_layers` on, where `use_sliding_window`)."""
    enabled = read.flag("use_sliding_window")
    window = read.optional_integer("sliding_window", high=MAX_POSITIONS) if "sliding_window" in data else 4096
    first = read.integer("max_window_layers", 28, low=0, high=MAX_POSITIONS)
    if not enabled:
        window = None
    kinds = data.get("layer_types")
    if kinds is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise read.invalid(
            "layer_types", f"a list that names full_attention or sliding_attention for each of the {num_layers} layers"
        )
    if window is None and "sliding_attention" in kinds:
        raise read.invalid("layer_types", "full_attention throughout where use_sliding_window or sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
