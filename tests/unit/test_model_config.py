"""`config.json`: a valid ModelConfig or an error that names the key, its value and what was expected."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stageline.errors import CheckpointError
from stages.config import ModelConfig
from tests.unit.weights_helpers import CONFIG_72B

BASE = CONFIG_72B
KEYS = [
    "architectures", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size", "torch_dtype", "surprise",
]  # fmt: skip
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 64, 10**9, 10**400, 8192.0, True, math.nan])
INNER = st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "type", "factor"]), NUMBERS | st.just("default"))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["896", "silu", "sliding_attention"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def outcome(data) -> ModelConfig | CheckpointError:
    try:
        return ModelConfig.from_dict(data, source="somewhere/config.json")
    except CheckpointError as error:
        return error


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(KEYS), JSON | INNER, min_size=1, max_size=3))
@example({"num_hidden_layers": 10**9})
@example({"rope_theta": 10**400})
@example({"layer_types": [["full_attention"]] * 80})
def test_any_values_end_in_a_valid_config_or_a_typed_error(change) -> None:
    config = outcome({**BASE, **change})
    if isinstance(config, CheckpointError):
        assert "somewhere/config.json" in config.message
        assert len(config.message) < 1000
        if config.reason == "CONFIG_VALUE_NOT_SERVED":
            assert config.metadata.keys() >= {"field", "value", "expected"}
            assert config.metadata["field"] in config.message
        return
    sizes = (config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim, config.vocab_size)
    assert all(type(size) is int and size > 0 for size in sizes)
    assert len(config.sliding_windows) == config.num_layers
    assert all(window is None or window > 0 for window in config.sliding_windows)
    assert config.num_heads % config.num_kv_heads == config.head_dim % 2 == 0
    assert math.isfinite(config.rope_theta)
    assert 0 < config.rms_norm_eps <= 1
    assert all(0 <= token_id < config.vocab_size for token_id in config.eos_token_ids)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"hidden_size": "896"}, "hidden_size", "'896'"),
        ({"hidden_size": 8192.0}, "hidden_size", "8192.0"),
        ({"hidden_size": True}, "hidden_size", "True"),
        ({"hidden_size": None}, "hidden_size", "None"),
        ({"intermediate_size": [29568]}, "intermediate_size", "[29568]"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", "1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
        ({"num_attention_heads": -64}, "num_attention_heads", "-64"),
        ({"num_attention_heads": 63}, "num_attention_heads", "63"),
        ({"num_key_value_heads": 7}, "num_key_value_heads", "7"),
        ({"num_key_value_heads": 0}, "num_key_value_heads", "0"),
        ({"num_attention_heads": 8192}, "head_dim", "1"),
        ({"vocab_size": math.nan}, "vocab_size", "nan"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings", "2147483648"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps", "nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps", "'1e-6'"),
        ({"rope_theta": math.inf}, "rope_theta", "inf"),
        ({"rope_theta": 0}, "rope_theta", "0"),
        ({"rope_parameters": 3}, "rope_parameters", "3"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta", "'x'"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_parameters.rope_theta", "7.0"),
        ({"rope_scaling": []}, "rope_scaling", "[]"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling", "{'type': ['yarn']}"),
        ({"eos_token_id": "x"}, "eos_token_id", "'x'"),
        ({"eos_token_id": [1, -1]}, "eos_token_id", "[1, -1]"),
        ({"eos_token_id": 152064}, "eos_token_id", "152064"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings", "'false'"),
        ({"use_sliding_window": 1}, "use_sliding_window", "1"),
        ({"use_sliding_window": True, "sliding_window": "4096"}, "sliding_window", "'4096'"),
        ({"max_window_layers": None}, "max_window_layers", "None"),
        ({"layer_types": "full_attention"}, "layer_types", "'full_attention'"),
        ({"layer_types": [{}] * 80}, "layer_types", None),
        ({"layer_types": ["sliding_attention"] * 80}, "layer_types", None),
    ],
    ids=str,
)
def test_each_wrong_value_is_named(change, field: str, value: str | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict({**BASE, **change})
    assert (caught.value.reason, caught.value.metadata["field"]) == ("CONFIG_VALUE_NOT_SERVED", field)
    assert f"{field} must be {caught.value.metadata['expected']}" in caught.value.message
    if value is not None:
        assert caught.value.metadata["value"] == value
        assert value in caught.value.message


def test_architectures_that_are_no_list_are_not_passed_over() -> None:
    for value in (0, "", {}, "Qwen2ForCausalLM"):
        with pytest.raises(CheckpointError, match="is not served"):
            ModelConfig.from_dict({**BASE, "architectures": value})


def test_the_rotary_base_stands_in_either_place() -> None:
    without = {key: value for key, value in BASE.items() if key != "rope_theta"}
    inside = {**without, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": None}
    assert ModelConfig.from_dict(inside).rope_theta == 5e5
    assert ModelConfig.from_dict({**inside, "rope_theta": 500000}).rope_theta == 5e5
    assert ModelConfig.from_dict(without).rope_theta == 10000.0


def test_a_null_window_is_full_attention() -> None:
    config = ModelConfig.from_dict({**BASE, "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0})
    assert config.sliding_windows == (None,) * 80


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "3", "null", '"x"', "{", "", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\x00"],
    ids=len,
)
def test_a_file_that_holds_no_object_is_an_error(tmp_path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        ModelConfig.from_file(path)
    assert caught.value.reason == "CONFIG_UNREADABLE"


def test_not_utf8_and_constants_that_json_does_not_have(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_file(path)
    path.write_text(json.dumps({**BASE, "rms_norm_eps": math.inf}))
    with pytest.raises(CheckpointError, match="rms_norm_eps must be"):
        ModelConfig.from_file(path)
