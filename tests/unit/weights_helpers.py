"""Small checkpoints written to a folder: safetensors with and without an index, and GGUF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from stages.config import ModelConfig
from stages.partition import LayerRange, tensor_shapes

TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "eos_token_id": 3,
}  # fmt: skip
CONFIG_72B: dict[str, Any] = TINY | {
    "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 131072,
}  # fmt: skip


class Collector:
    """Keeps what is loaded; `refuse` raises in its place. Targets are as the model's: contiguous, of the stage's dtype."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, refuse: Exception | None = None) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._shapes = tensor_shapes(config, LayerRange(0, config.num_layers))
        self._dtype, self._refuse = dtype, refuse
        self._started: dict[str, torch.Tensor] = {}

    def target(self, name: str) -> torch.Tensor:
        assert name not in self._started
        self._started[name] = torch.full(self._shapes[name], float("nan"), dtype=self._dtype)
        return self._started[name]

    def loaded(self, name: str) -> None:
        if self._refuse is not None:
            raise self._refuse
        assert name not in self.tensors
        self.tensors[name] = self._started[name]


def whole(config: ModelConfig) -> LayerRange:
    return LayerRange(0, config.num_layers)


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Every tensor of the model, in the order of a published checkpoint (embedding, layers, norm, head)."""
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(config, whole(config))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def pack(num_bytes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Fill shards in order; a tensor that would make one larger than `shard_bytes` begins the next."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in num_bytes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_metadata(folder: Path, config: Mapping[str, Any], weight_map: Mapping[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weight_map is not None:
        write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sharded(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], count: int
) -> dict[str, str]:
    """Write `count` shards of about equal size and their index; returns tensor name → shard."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    low, high = 1, sum(sizes.values())
    while low < high:  # the smallest size that needs no more than `count` shards
        middle = (low + high) // 2
        low, high = (low, middle) if len(pack(sizes, middle)) <= count else (middle + 1, high)
    shards = pack(sizes, low)
    assert len(shards) == count
    weight_map = {name: shard_name(i, count) for i, names in enumerate(shards) for name in names}
    write_metadata(folder, config, weight_map)
    for i, names in enumerate(shards):
        save_file({name: tensors[name].contiguous() for name in names}, folder / shard_name(i, count))
    return weight_map


def write_single(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    write_metadata(folder, config)
    save_file(dict(tensors), folder / "model.safetensors")


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite one shard after `change` has altered its tensors."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def write_sparse_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A bfloat16 shard with a true header, of its full size, whose data takes no room on the disk."""
    header, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)


GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(hf_name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if hf_name in fixed:
        return fixed[hf_name]
    _, _, layer, rest = hf_name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[part]}.{kind}"


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    architecture: str = "qwen2",
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    extra: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    skip_keys: tuple[str, ...] = (),
) -> None:
    """Write TINY's model (float32 tensors under their Hugging Face names) as a converter does: matrices quantized, the
    rows of llama's q and k permuted for the interleaved rotary embedding."""
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = TINY["num_attention_heads"], TINY["num_key_value_heads"]
    integers = {
        "block_count": TINY["num_hidden_layers"],
        "context_length": 64,
        "embedding_length": TINY["hidden_size"],
        "feed_forward_length": TINY["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    for key, value in integers.items():
        if key not in skip_keys:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e6)
    if architecture == "llama":
        writer.add_uint32("llama.rope.dimension_count", TINY["hidden_size"] // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(47)] + ["Ġé"])
    writer.add_token_types([1] * 46 + [3, 4])
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_eos_token_id(46)
    writer.add_bos_token_id(45)
    writer.add_chat_template("{{ messages }}")
    extra(writer)
    for name, tensor in tensors.items():
        for part, num in (("q_proj.weight", heads), ("k_proj.weight", kv_heads)):
            if architecture == "llama" and name.endswith(part):
                rows, columns = tensor.shape
                tensor = tensor.reshape(num, 2, rows // num // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        kind = quantization if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
