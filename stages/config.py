"""The architecture of a model, read from its `config.json`. No torch here: the gateway and the planner import it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.errors import CheckpointError

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
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _invalid(name, f"{name} must be a positive integer, got {value!r}", value=value)
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise _invalid(name, f"{name} must be a positive number, got {value!r}", value=value)
        if self.num_heads % self.num_kv_heads:
            raise _invalid(
                "num_key_value_heads",
                f"num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads ({self.num_kv_heads})",
            )
        if self.head_dim % 2:
            raise _invalid("head_dim", f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Build from a parsed Qwen2 `config.json`; `source` is named in errors.

        Raises CheckpointError for another architecture, an unknown key, or a value this project does not compute
        exactly (rope scaling, quantization, another activation).
        """
        architectures = data.get("architectures") or []
        if data.get("model_type") != "qwen2" or architectures not in ([], ["Qwen2ForCausalLM"]):
            raise CheckpointError(
                "UNKNOWN_ARCHITECTURE",
                f"{source}: model_type {data.get('model_type')!r} with architectures {architectures} is not served; "
                "expected model_type 'qwen2' with Qwen2ForCausalLM",
                model_type=data.get("model_type"),
                architectures=architectures,
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
        rope = _rope_theta(data, source)
        if data.get("hidden_act", "silu") != "silu":
            raise _invalid("hidden_act", f"{source}: hidden_act must be 'silu', got {data['hidden_act']!r}")
        if data.get("quantization_config") is not None:
            raise _invalid("quantization_config", f"{source}: quantized checkpoints are not served; use the original")
        num_heads = data["num_attention_heads"]
        eos = data.get("eos_token_id")
        head_dim = data.get("head_dim")
        if head_dim is None:
            if not isinstance(num_heads, int) or num_heads < 1 or data["hidden_size"] % num_heads:
                raise _invalid(
                    "num_attention_heads",
                    f"{source}: hidden_size ({data['hidden_size']}) must be a multiple "
                    f"of num_attention_heads ({num_heads})",
                )
            head_dim = data["hidden_size"] // num_heads
        num_kv_heads = data.get("num_key_value_heads")
        return cls(
            architecture="qwen2",
            hidden_size=data["hidden_size"],
            intermediate_size=data["intermediate_size"],
            num_layers=data["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            vocab_size=data["vocab_size"],
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=rope,
            max_position_embeddings=data.get("max_position_embeddings", 32768),
            tie_word_embeddings=data.get("tie_word_embeddings", False),
            qkv_bias=True,
            sliding_windows=_sliding_windows(data, source),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
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
        except (ValueError, OSError) as error:
            raise CheckpointError("CONFIG_UNREADABLE", f"{path} cannot be read as JSON: {error}", path=path) from None
        if not isinstance(data, dict):
            raise CheckpointError("CONFIG_UNREADABLE", f"{path} must hold a JSON object", path=path)
        return cls.from_dict(data, source=str(path))


def _invalid(field: str, message: str, **metadata: object) -> CheckpointError:
    return CheckpointError("CONFIG_VALUE_NOT_SERVED", message, field=field, **metadata)


def _rope_theta(data: Mapping[str, Any], source: str) -> float:
    """The rotary base; transformers 5 writes it into `rope_parameters`, earlier versions beside `rope_scaling`."""
    parameters = dict(data.get("rope_parameters") or {})
    scaling = data.get("rope_scaling") or {}
    kind = parameters.pop("rope_type", None) or scaling.get("rope_type") or scaling.get("type") or "default"
    theta = parameters.pop("rope_theta", None) or data.get("rope_theta", 10000.0)
    if kind != "default" or parameters:
        raise _invalid(
            "rope_scaling",
            f"{source}: rope scaling {kind!r} {parameters or scaling} is not served; "
            "remove rope_scaling and keep prompts within max_position_embeddings",
        )
    return float(theta)


def _sliding_windows(data: Mapping[str, Any], source: str) -> tuple[int | None, ...]:
    """The window of each layer (transformers: layers from `max_window_layers` on, where `use_sliding_window`)."""
    num_layers = data["num_hidden_layers"]
    if not isinstance(num_layers, int) or num_layers < 1:
        raise _invalid(
            "num_hidden_layers", f"{source}: num_hidden_layers must be a positive integer, got {num_layers!r}"
        )
    window = data.get("sliding_window", 4096) if data.get("use_sliding_window") else None
    kinds = data.get("layer_types")
    if kinds is None:
        first = data.get("max_window_layers", 28)
        kinds = [
            "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(num_layers)
        ]
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise _invalid(
            "layer_types",
            f"{source}: layer_types must name full_attention or sliding_attention for each of "
            f"the {num_layers} layers, got {kinds}",
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise _invalid("sliding_window", f"{source}: sliding_window must be a positive integer, got {window!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
