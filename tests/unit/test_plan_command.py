"""`stageline plan`: what it prints and what it refuses."""

from __future__ import annotations

import json

import pytest

from gateway.cli import main
from gateway.planner.catalogue import known_models


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = main(["plan", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line_json_and_table(capsys) -> None:
    code, out, _ = run(capsys, "--model", "qwen2-72b", "--gpu", "a100-80g:4", "--output", "json")
    data = json.loads(out)
    assert code == 0
    assert data["parameters"] == sum(stage["parameters"] for stage in data["stages"]) == 72_706_203_648
    assert set(data["advice"]) == {"binding", "throughput_gain", "latency_gain", "help"}
    code, out, _ = run(capsys, "--model", "qwen2-72b", "--gpu", "a100-80g:4")
    assert code == 0
    for words in ("61-80", "unassigned", "ms a token", "tokens/s", "bound by"):
        assert words in out
    code, out, _ = run(capsys, "--model", "qwen2-72b", "--gpu", "a100-80g:1")
    assert code == 1
    assert "does not fit" in out
    assert "would fit" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--gpu", "b100:1"), "a100-80g"),
        (("--gpu", "a100-80g:4", "--link-gbps", "0"), "--link-gbps"),
        (("--gpu", "a100-80g:4", "--link-gbps", "nan"), "--link-gbps"),
        (("--gpu", "a100-80g:4", "--usable-fraction", "1.5"), "--usable-fraction"),
        (("--gpu", "a100-80g:4", "--context-tokens", "0"), "--context-tokens"),
        (("--gpu", "a100-80g:4", "--cores", "0"), "--cores"),
        (("--gpu", "a100-80g:4", "--sequences", "0"), "--sequences"),
        (("--gpu", "a100-80g:4", "--context-tokens", "200000"), "131072"),
        (("--profile", "x.yaml"), "--gpu"),
        (("--gpu", "a100-80g:4", "--quantization", "int8"), "leave --quantization out"),
        (("--gpu", "a100-80g:4", "--profile", "/nowhere.yaml"), "nowhere"),
    ],
)
def test_command_line_refuses(capsys, args: tuple[str, ...], says: str) -> None:
    code, out, err = run(capsys, "--model", "qwen2-72b", *args)
    assert (code, out) == (2, "")
    assert says in err


def test_an_unknown_model_lists_the_known_ones(capsys) -> None:
    code, _, err = run(capsys, "--model", "qwen3-72b", "--gpu", "a100-80g:4")
    assert code == 2
    assert all(name in err for name in known_models())


def test_sizes_without_gpus_by_name(capsys) -> None:
    code, out, _ = run(capsys, "--model", "qwen2-72b", "--stages", "4", "--output", "json")
    assert code == 0
    assert [stage["layers"] for stage in json.loads(out)["stages"]] == ["0-21", "21-41", "41-61", "61-80"]
