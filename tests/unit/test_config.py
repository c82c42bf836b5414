"""Configuration: precedence, unknown keys, and the same field in its three spellings."""

from __future__ import annotations

import pickle

import pytest

from gateway.config import Config, fields, load
from stageline.errors import ConfigError, ResourceExhaustedError


def test_flag_beats_environment_beats_file_beats_default(tmp_path) -> None:
    file = tmp_path / "stageline.yaml"
    file.write_text("kv_cache: {block_size_tokens: 32, num_blocks: 100}\nserver: {grpc_port: 1}\n")
    environ = {
        "STAGELINE_KV_CACHE__NUM_BLOCKS": "200",
        "STAGELINE_SERVER__GRPC_PORT": "2",
        "STAGELINE_TEST_MODELS": "x",
    }
    config = load(str(file), {"server.grpc_port": "3"}, environ)
    assert (config.kv_cache.block_size_tokens, config.kv_cache.num_blocks, config.server.grpc_port) == (32, 200, 3)
    assert config.server.http_port == Config().server.http_port


@pytest.mark.parametrize(
    ("flags", "environ", "text", "match"),
    [
        ({"stages.count": "0"}, {}, "", r"command line: stages\.count: .*greater than or equal to 1.*'0'"),
        ({"stages.count": "two"}, {}, "", r"stages\.count: .*'two'"),
        ({"model.dtype": "int3"}, {}, "", r"model\.dtype: .*'float32' or 'bfloat16'"),
        ({}, {"STAGELINE_KV_CACHE__BLOCKS": "1"}, "", r"STAGELINE_KV_CACHE__BLOCKS"),
        ({}, {}, "kv_cache: {blocks: 1}", r"unknown key 'kv_cache\.blocks'"),
        ({}, {}, "kvcache: {}", r"unknown key 'kvcache'"),
        ({}, {}, "[1, 2]", r"expected sections"),
        ({}, {}, "a: [", r"not readable as YAML"),
        ({"server.grpc_port": "70000"}, {}, "", r"server\.grpc_port"),
    ],
)
def test_mistakes_are_named(flags, environ, text, match, tmp_path) -> None:
    file = tmp_path / "stageline.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load(str(file), flags, environ)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load("nowhere.yaml", {}, {})


def test_every_field_says_what_it_is() -> None:
    described = list(fields())
    assert len(described) > 20
    assert all(description for *_, description in described)


def test_errors_survive_pickling() -> None:
    error = ResourceExhaustedError("QUEUE_FULL", "the queue is full", retry_after_s=2.5, queued=7)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, str(again), again.metadata) == (
        ResourceExhaustedError,
        "QUEUE_FULL",
        "the queue is full",
        {"retry_after_s": "2.5", "queued": "7"},
    )
