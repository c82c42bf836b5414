"""Splits and tensor accounting: cover, order, disjointness and sum for all small sizes, and the real 72B."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.planner.report import make_plan
from gateway.planner.split import lm_head_cost_layers, resolve_layers, split
from stageline.errors import CheckpointError, ConfigError
from stages.config import ModelConfig
from stages.partition import LayerRange, check_cover, num_parameters, parse_layer_ranges, tensor_shapes

QWEN2_72B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
}


@pytest.fixture(scope="module")
def config_72b() -> ModelConfig:
    return ModelConfig.from_dict(QWEN2_72B)


@pytest.mark.parametrize("num_layers", range(1, 33))
def test_split_covers_in_order_without_overlap(config_72b: ModelConfig, num_layers: int) -> None:
    config = replace(config_72b, num_layers=num_layers, sliding_windows=(None,) * num_layers)
    for num_stages in range(1, num_layers + 1):
        ranges = split(config, num_stages)
        assert len(ranges) == num_stages
        assert [i for r in ranges for i in range(r.start_layer, r.end_layer)] == list(range(num_layers))
        assert all(len(r) >= 1 for r in ranges)
        check_cover(ranges, num_layers)


@given(num_layers=st.integers(2, 40), data=st.data())
def test_split_has_the_fastest_slowest_stage(num_layers: int, data: st.DataObject) -> None:
    config = replace(ModelConfig.from_dict(QWEN2_72B), num_layers=num_layers, sliding_windows=(None,) * num_layers)
    num_stages = data.draw(st.integers(2, min(num_layers, 6)))
    head = lm_head_cost_layers(config)

    def slowest(lengths: list[int]) -> float:
        return max(*lengths[:-1], lengths[-1] + head)

    # The best over every length of the last stage, the others as even as they can be.
    best = min(
        slowest([math.ceil((num_layers - last) / (num_stages - 1))] * (num_stages - 1) + [last])
        for last in range(1, num_layers - num_stages + 2)
    )
    assert slowest([len(r) for r in split(config, num_stages)]) == best


def test_last_stage_of_the_72b_gets_fewer_layers(config_72b: ModelConfig) -> None:
    assert [len(r) for r in split(config_72b, 4)] == [21, 20, 20, 19]


@pytest.mark.parametrize("num_stages", [1, 4, 8, 10, 80])
def test_72b_parameters_are_counted_exactly_once(config_72b: ModelConfig, num_stages: int) -> None:
    ranges = split(config_72b, num_stages)
    assert sum(num_parameters(config_72b, r) for r in ranges) == 72_706_203_648
    names = [name for r in ranges for name in tensor_shapes(config_72b, r)]
    assert len(names) == len(set(names))
    plan = make_plan(
        config_72b, ranges, dtype="bfloat16", gpu_memory_bytes=80 << 30, usable_fraction=0.9, block_size_tokens=256
    )
    assert sum(stage.parameters for stage in plan.stages) == plan.parameters == 72_706_203_648
    assert plan.fits == (num_stages != 1)


def test_tied_embedding_is_read_by_first_and_last_stage(config_72b: ModelConfig) -> None:
    tied = replace(config_72b, tie_word_embeddings=True)
    first, last = (tensor_shapes(tied, r) for r in split(tied, 2))
    assert "model.embed_tokens.weight" in first.keys() & last.keys()
    assert "lm_head.weight" not in last


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0-40,41-80", "LAYERS_GAP"),
        ("0-40,39-80", "LAYERS_OVERLAP"),
        ("0-40,40-79", "LAYERS_GAP"),
        ("0-40,40-81", "LAYERS_OUT_OF_RANGE"),
        ("0-40,40-40,40-80", "LAYERS_EMPTY"),
        ("1-80", "LAYERS_GAP"),
        ("0-x", "LAYERS_NOT_RANGES"),
        ("", "LAYERS_NOT_RANGES"),
        ("0--5", "LAYERS_NOT_RANGES"),
    ],
)
def test_bad_layers_are_refused_by_reason(config_72b: ModelConfig, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_layers(config_72b, None, text)
    assert caught.value.reason == reason


def test_stages_and_layers_must_agree(config_72b: ModelConfig) -> None:
    assert resolve_layers(config_72b, 2, "0-1,1-80") == (LayerRange(0, 1), LayerRange(1, 80))
    with pytest.raises(ConfigError, match="names 2 ranges"):
        resolve_layers(config_72b, 3, "0-1,1-80")
    with pytest.raises(ConfigError, match="81 stages"):
        resolve_layers(config_72b, 81, None)
    assert parse_layer_ranges(" 0-9, 9-18 ") == (LayerRange(0, 9), LayerRange(9, 18))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mixtral"}, "UNKNOWN_ARCHITECTURE"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "UNKNOWN_ARCHITECTURE"),
        ({"attention_sink": 4}, "UNKNOWN_CONFIG_KEY"),
        ({"hidden_size": -1}, "CONFIG_VALUE_NOT_SERVED"),
        ({"num_key_value_heads": 7}, "CONFIG_VALUE_NOT_SERVED"),
        ({"hidden_act": "gelu"}, "CONFIG_VALUE_NOT_SERVED"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "CONFIG_VALUE_NOT_SERVED"),
        ({"quantization_config": {"bits": 4}}, "CONFIG_VALUE_NOT_SERVED"),
        ({"layer_types": ["full_attention"]}, "CONFIG_VALUE_NOT_SERVED"),
        ({"rms_norm_eps": 0}, "CONFIG_VALUE_NOT_SERVED"),
    ],
)
def test_configurations_we_would_compute_wrongly_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict({**QWEN2_72B, **change})
    assert caught.value.reason == reason


def test_sliding_windows_follow_max_window_layers() -> None:
    sliding = {**QWEN2_72B, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 78}
    assert ModelConfig.from_dict(sliding).sliding_windows == (None,) * 78 + (4096, 4096)
    assert ModelConfig.from_dict({**sliding, "use_sliding_window": False}).sliding_windows == (None,) * 80


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        ModelConfig.from_file(tmp_path / "config.json")
