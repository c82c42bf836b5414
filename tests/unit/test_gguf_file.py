"""GGUF: configuration, tokenizer, tensors; compared with transformers, and with the real SmolLM2."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from weights_helpers import TINY, Collector, random_tensors, whole, write_gguf

from stageline.errors import CheckpointError
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig
from stages.gguf_container import read_gguf
from stages.gguf_file import GgufTokenizer, read_gguf_config, read_gguf_tokenizer
from stages.partition import LM_HEAD, LayerRange, tensor_shapes
from stages.weights import load_weights

QWEN2 = dataclasses.replace(ModelConfig.from_dict(TINY), eos_token_ids=(46,))
LLAMA = dataclasses.replace(QWEN2, architecture="llama", qkv_bias=False)
CONFIGS = {"qwen2": QWEN2, "llama": LLAMA}
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def arrays(config: ModelConfig) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in random_tensors(config, torch.float32).items()}


def load(model: Path, layers: LayerRange, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(model))
    load_weights(checkpoint, layers, sink := Collector(checkpoint.config, dtype), dtype=dtype)
    return sink.tensors


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_config_and_exact_float32_tensors(tmp_path, architecture, tied) -> None:
    config = dataclasses.replace(CONFIGS[architecture], tie_word_embeddings=tied)
    tensors = arrays(config)
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, architecture=architecture, quantization=F32)
    assert read_gguf_config(path) == config
    loaded = load(path, whole(config), torch.float32)
    assert loaded.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(loaded[name].numpy(), values, err_msg=name)
    middle = load(path, LayerRange(1, 3), torch.float32)
    assert middle.keys() == tensor_shapes(config, LayerRange(1, 3)).keys()


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("quantization", [Q8_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F16])
def test_equal_to_transformers(tmp_path, architecture, quantization) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference for GGUF files")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = CONFIGS[architecture]
    write_gguf(tmp_path / "model.gguf", arrays(config), architecture=architecture, quantization=quantization)
    reference_config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(reference_config)
    # What `from_pretrained(gguf_file=)` calls; itself it asks for accelerate too.
    expected = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=model)["tensors"]
    loaded = load(tmp_path / "model.gguf", whole(config), torch.float32)
    assert loaded.keys() == expected.keys() == model.state_dict().keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert reference_config.rope_parameters["rope_theta"] == config.rope_theta
    assert np.float32(reference_config.rms_norm_eps) == np.float32(config.rms_norm_eps)
    assert reference_config.vocab_size == config.vocab_size


def test_bfloat16_is_cast_from_float32(tmp_path) -> None:
    write_gguf(tmp_path / "model.gguf", arrays(QWEN2))
    exact = load(tmp_path / "model.gguf", whole(QWEN2), torch.float32)
    cast = load(tmp_path / "model.gguf", whole(QWEN2), torch.bfloat16)
    assert all(torch.equal(cast[name], tensor.to(torch.bfloat16)) for name, tensor in exact.items())


def test_tokenizer(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, extra=lambda writer: writer.add_add_bos_token(True))
    assert read_gguf_tokenizer(path) == GgufTokenizer(
        model="gpt2",
        pre="qwen2",
        tokens=(*(f"t{i}" for i in range(47)), "Ġé"),
        token_types=(1,) * 46 + (3, 4),
        merges=("a b", "Ġ c"),
        bos_token_id=45,
        eos_token_id=46,
        chat_template="{{ messages }}",
        add_bos_token=True,
    )


def test_end_of_turn_is_an_end_token_too(tmp_path) -> None:
    write_gguf(tmp_path / "model.gguf", arrays(QWEN2), extra=lambda writer: writer.add_eot_token_id(47))
    assert read_gguf_config(tmp_path / "model.gguf").eos_token_ids == (46, 47)


@pytest.mark.parametrize(("extra", "reason", "match"), [
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "CONFIG_VALUE_NOT_SERVED", "qwen2.rope.scaling.type"),
    (lambda w: w.add_rope_scaling_factor(4.0), "CONFIG_VALUE_NOT_SERVED", "qwen2.rope.scaling.factor"),
    (lambda w: w.add_expert_count(8), "CONFIG_VALUE_NOT_SERVED", "qwen2.expert_count"),
    (lambda w: w.add_sliding_window(8), "UNKNOWN_CONFIG_KEY", "qwen2.attention.sliding_window"),
    (lambda w: w.add_rope_dimension_count(4), "CONFIG_VALUE_NOT_SERVED", "qwen2.rope.dimension_count"),
    (lambda w: w.add_uint16("split.count", 2), "CONFIG_VALUE_NOT_SERVED", "gguf-split"),
])  # fmt: skip
def test_what_would_change_the_function_is_refused(tmp_path, extra, reason, match) -> None:
    write_gguf(tmp_path / "model.gguf", arrays(QWEN2), extra=extra)
    with pytest.raises(CheckpointError, match=match) as error:
        open_checkpoint(str(tmp_path / "model.gguf"))
    assert error.value.reason == reason


def test_another_architecture_and_a_missing_key(tmp_path) -> None:
    write_gguf(tmp_path / "model.gguf", arrays(QWEN2), architecture="gemma2")
    with pytest.raises(CheckpointError, match="'gemma2' is not served; expected qwen2 or llama"):
        open_checkpoint(str(tmp_path / "model.gguf"))
    write_gguf(tmp_path / "model.gguf", arrays(QWEN2), skip_keys=("block_count",))
    with pytest.raises(CheckpointError, match=r"missing key qwen2\.block_count"):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_more_layers_than_tensors(tmp_path) -> None:
    """A damaged count must not make us list four billion layers."""
    path = tmp_path / "model.gguf"
    write_gguf(
        path, arrays(QWEN2), skip_keys=("block_count",), extra=lambda w: w.add_uint32("qwen2.block_count", 2**32 - 1)
    )
    with pytest.raises(CheckpointError, match="4294967295 layers"):
        open_checkpoint(str(path))


def test_missing_extra_and_misshapen_tensors(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = arrays(QWEN2)
    write_gguf(path, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=name) as error:
        open_checkpoint(str(path))
    assert error.value.reason == "TENSOR_MISSING"
    write_gguf(path, tensors, extra=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight") as error:
        open_checkpoint(str(path))
    assert error.value.reason == "TENSOR_UNEXPECTED"
    write_gguf(path, tensors | {name: np.zeros((64, 32), np.float32)})
    with pytest.raises(CheckpointError, match=name) as error:
        open_checkpoint(str(path)).verify_index(LayerRange(1, 2))
    assert (error.value.reason, error.value.metadata["actual"]) == ("TENSOR_SHAPE_WRONG", "[64, 32]")


def test_cut_anywhere_a_file_is_refused(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, arrays(QWEN2))
    data = path.read_bytes()
    header_bytes = min(tensor.begin for tensor in read_gguf(path).tensors.values())
    for size in [*range(0, header_bytes, 7), header_bytes, len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(str(path))
        assert error.value.reason in ("GGUF_TRUNCATED", "GGUF_UNREADABLE", "GGUF_CORRUPT"), size
        assert str(path) in error.value.message


def test_flipped_header_bytes_never_end_in_another_error(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, arrays(QWEN2))
    data = bytearray(path.read_bytes())
    header_bytes = min(tensor.begin for tensor in read_gguf(path).tensors.values())
    random = np.random.default_rng(0)
    refused = 0
    for position in random.integers(0, header_bytes, 300):
        damaged = data.copy()
        damaged[position] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            open_checkpoint(str(path)).verify_index(whole(QWEN2))
        except CheckpointError:
            refused += 1
    assert refused > 50  # a flipped letter of a token or a name of a key can go unnoticed


def test_the_real_smollm2_equals_its_prepared_checkpoint(model_folder) -> None:
    """The folder holds the same file, dequantized and cast by another program (as Qwen2: with biases of zero)."""
    path = os.environ.get("STAGELINE_TEST_GGUF")
    if not path:
        pytest.skip("STAGELINE_TEST_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = model_folder("smollm2")
    config = read_gguf_config(Path(path))
    prepared_config = open_checkpoint(str(folder)).config
    ignored = {"architecture": "", "qkv_bias": False}
    assert dataclasses.replace(config, **ignored) == dataclasses.replace(prepared_config, **ignored)
    prepared = load(folder, whole(config), torch.bfloat16)
    loaded = load(Path(path), whole(config), torch.bfloat16)
    assert loaded.keys() == {name for name in prepared if not name.endswith(".bias")}
    assert LM_HEAD not in loaded
    assert all(torch.equal(tensor, prepared[name]) for name, tensor in loaded.items())
    tokenizer = read_gguf_tokenizer(Path(path))
    assert (tokenizer.pre, len(tokenizer.tokens), tokenizer.bos_token_id, tokenizer.add_bos_token) == (
        "smollm",
        49152,
        1,
        False,
    )
    assert tokenizer.chat_template is not None
