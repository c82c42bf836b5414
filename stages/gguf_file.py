"""Models in GGUF files: the architectures `qwen2` and `llama`. No torch here.

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reference for what a file means is
transformers with `gguf_file=`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stageline.errors import CheckpointError
from stages.config import ModelConfig
from stages.gguf_container import GgufFile, GgufTensor, read_gguf
from stages.partition import EMBEDDING, FINAL_NORM, LM_HEAD

ARCHITECTURES = ("qwen2", "llama")
_GLOBAL_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", re.ASCII)
_READ_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "vocab_size",
})  # fmt: skip
# Keys that may be there when they say "nothing special".
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.finetuned": (False,), "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The tokenizer a GGUF file carries. `token_types` are ggml's: 1 normal, 2 unknown, 3 control, 4 user defined,
    5 unused, 6 byte. `tokens` and `merges` (`"left right"`) are in the byte-level alphabet of GPT-2 where `model` is
    `gpt2`; `pre` names the pre-tokenizer ("" where the file does not say)."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    add_bos_token: bool


def read_gguf_config(path: Path) -> ModelConfig:
    """The model's configuration. Raises CheckpointError as `config_of` and `read_gguf` do."""
    return config_of(read_gguf(path))


def config_of(file: GgufFile) -> ModelConfig:
    """The configuration of an open file.

    Raises CheckpointError: UNKNOWN_ARCHITECTURE, UNKNOWN_CONFIG_KEY, CONFIG_KEY_MISSING, CONFIG_VALUE_NOT_SERVED (rope
    scaling, partial rotary embeddings, experts, a split file), TENSOR_MISSING (no embedding).
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            "UNKNOWN_ARCHITECTURE",
            f"{file.path}: GGUF architecture {architecture!r} is not served; expected {' or '.join(ARCHITECTURES)}",
            architecture=architecture,
            path=file.path,
        )
    if file.metadata.get("split.count", 1) > 1:
        raise _not_served(file, "split.count", "the model is split into several files; merge them with gguf-split")
    prefix = f"{architecture}."
    keys = _Keys(file, prefix)
    for key, value in keys.items():
        if key in _READ_KEYS:
            continue
        if key not in _NEUTRAL_VALUES:
            raise CheckpointError(
                "UNKNOWN_CONFIG_KEY",
                f"{file.path}: {prefix}{key} = {value!r:.80} is not known here and "
                "could change what the model computes",
                key=prefix + key,
                path=file.path,
            )
        if value not in _NEUTRAL_VALUES[key]:
            raise _not_served(file, prefix + key, f"{value!r:.80} is not served")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            "TENSOR_MISSING", f"{file.path}: token_embd.weight is missing", tensor="token_embd.weight", path=file.path
        )
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(key, head_dim) != head_dim:
            raise _not_served(file, prefix + key, f"{keys[key]} differs from the head size {head_dim}")
    num_layers = keys.integer("block_count")
    if num_layers > len(file.tensors):  # before anything of that length is made
        raise _not_served(file, prefix + "block_count", f"{num_layers} layers in a file of {len(file.tensors)} tensors")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],  # the metadata may count only the tokens, without the padding rows
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        max_position_embeddings=keys.integer("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias=architecture == "qwen2",
        sliding_windows=(None,) * num_layers,
        eos_token_ids=_end_tokens(file.metadata),
    )


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer in the file's metadata, as it stands there. Raises CheckpointError: TOKENIZER_MISSING where the
    vocabulary is missing or its lists differ in length, and as `read_gguf` does."""
    metadata = read_gguf(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        raise CheckpointError(
            "TOKENIZER_MISSING",
            f"{path} must have tokenizer.ggml.tokens and tokenizer.ggml.token_type of the same length",
            path=path,
        )
    return GgufTokenizer(
        model=str(metadata.get("tokenizer.ggml.model", "")),
        pre=str(metadata.get("tokenizer.ggml.pre", "")),
        tokens=tuple(tokens),
        token_types=tuple(types),
        merges=tuple(metadata.get("tokenizer.ggml.merges", ())),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    )


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; a name without a counterpart stays as it is."""
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _GLOBAL_NAMES.get(gguf_name, gguf_name)


def tensors_by_hf_name(file: GgufFile) -> dict[str, GgufTensor]:
    """Every tensor of the file under its Hugging Face name."""
    return {hf_name(name): tensor for name, tensor in file.tensors.items()}


def verify_tensors(file: GgufFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError (TENSOR_MISSING, TENSOR_SHAPE_WRONG) unless the file has `expected` (HF name → shape)."""
    tensors = tensors_by_hf_name(file)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                "TENSOR_MISSING", f"{file.path}: {name} is missing", tensor=name, shard=file.path.name
            )
        if tensor.shape != shape:
            raise CheckpointError(
                "TENSOR_SHAPE_WRONG",
                f"{file.path}: {tensor.name} ({name}) has shape "
                f"{list(tensor.shape)}, the metadata ask for {list(shape)}",
                tensor=name,
                shard=file.path.name,
                expected=list(shape),
                actual=list(tensor.shape),
            )


def dequantize(file: GgufFile, config: ModelConfig, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One tensor as float32 in the layout of the Hugging Face checkpoint. Raises CheckpointError as `GgufFile.read`.

    llama files store the rows of q and k for the interleaved rotary embedding (pairs (2i, 2i + 1)); Hugging Face and
    our kernels rotate halves (i, i + head_dim/2), so row 2i + j of a head goes to row j·head_dim/2 + i. qwen2 files
    store them as Hugging Face does.
    """
    values = file.read(tensor)
    if config.architecture != "llama" or not tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        return values
    pairs = values.reshape(-1, config.head_dim // 2, 2, values.shape[-1])  # [head, pair, 2, hidden_size]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


class _Keys(dict[str, Any]):
    """The metadata keys of the architecture, without its prefix."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        super().__init__((k.removeprefix(prefix), v) for k, v in file.metadata.items() if k.startswith(prefix))
        self.file, self.prefix = file, prefix

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(
                "CONFIG_KEY_MISSING",
                f"{self.file.path}: missing key {self.prefix}{key}",
                keys=self.prefix + key,
                path=self.file.path,
            )
        if not isinstance(value, int) or isinstance(value, bool):  # a list where it differs from layer to layer
            raise _not_served(self.file, self.prefix + key, f"must be one integer, got {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, float):
            return float(self.integer(key))
        return float(str(np.float32(value)))  # the shortest decimal: 1e-05, not 9.999999747378752e-06


def _end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, and end of turn where the file names one."""
    ids = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _not_served(file: GgufFile, key: str, fault: str) -> CheckpointError:
    return CheckpointError("CONFIG_VALUE_NOT_SERVED", f"{file.path}: {key}: {fault}", field=key, path=file.path)
