"""`stageline bench load` on a small checkpoint, and with wrong input."""

from __future__ import annotations

import json

import pytest

from gateway.cli import main
from tests.tiny import save_tiny


def test_figures(tmp_path, capsys) -> None:
    folder = save_tiny(tmp_path / "model")
    code = main(["bench", "load", "--model", str(folder), "--layers", "1-4", "--repeats", "2", "--output", "json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["what"], report["model"], report["layers"]) == ("load", "model", "1-4")
    assert set(report["gb_per_s"]) == {"plain_cold", "load_cold", "plain_warm", "load_warm"}
    assert all(ratio > 0 for ratio in report["load_over_plain"].values())
    memory = report["memory"]
    assert memory["weights_bytes"] * 2 == report["file_bytes"]  # the tiny model is stored in float32
    assert memory["beyond_weights_and_kv_bytes"] < 600e6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "{tiny}", "--layers", "0-5"], "--layers 0-5"),
        (["--model", "{tiny}", "--layers", "2-1"], "--layers 2-1"),
        (["--model", "{tiny}", "--layers", "all"], "--layers all"),
        (["--model", "{tiny}", "--repeats", "0"], "--repeats"),
    ],
)
def test_wrong_input(arguments, named, tmp_path, capsys) -> None:
    folder = save_tiny(tmp_path / "model")
    assert main(["bench", "load", *(argument.format(tiny=folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
