"""What a process writes on stderr in each format, and that the audit log's lines are objects and not text in one."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, time
from gateway.access.audit import Audit
from gateway.api.errors import as_typed
from gateway.api.request_id import current
from stages.logs import log_to_stderr

log_to_stderr(sys.argv[1], layers="0-2")
logging.getLogger("stageline.gateway").info("two\\nlines of %s \\ud800", "é", extra={"layers": "2-4", "epoch": 3})
logging.getLogger("stageline.gateway").debug("nobody asked")
logging.getLogger("stages.loading").info("nor for this")
current.set("r-1")
try:
    {}["missing"]
except KeyError as error:
    as_typed(error, where="the test")
Audit().record(door="grpc", method="M", peer="p", request_id="r-2", status="OK", duration_s=0.5)
"""


def stderr(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format], capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8:backslashreplace"},
    )  # fmt: skip
    return done.stderr.splitlines()


def test_a_line_is_an_object() -> None:
    first, failed, call = map(json.loads, stderr("json"))
    assert first["message"] == "two\nlines of é \ud800"
    assert (first["level"], first["logger"], first["layers"], first["epoch"]) == ("INFO", "stageline.gateway", "2-4", 3)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(first["time"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    assert (failed["level"], failed["request_id"], failed["layers"]) == ("ERROR", "r-1", "0-2")
    assert failed["message"] == "request r-1: the test failed"
    assert failed["exception"].startswith("Traceback")
    assert failed["exception"].endswith("KeyError: 'missing'")
    assert (call["logger"], call["message"], call["request_id"], call["status"]) == (
        "stageline.audit",
        "call",
        "r-2",
        "OK",
    )
    assert first["pid"] == failed["pid"] == call["pid"] > 0
    assert "request_id" not in first


def test_text_is_for_people() -> None:
    lines = stderr("text")
    assert lines[0].endswith(" INFO stageline.gateway: two")
    assert lines[1] == "lines of é \\ud800"
    assert lines[2].endswith(" ERROR stageline.gateway: request r-1: the test failed")
    assert lines[-2] == "KeyError: 'missing'"
    audit = lines[-1].partition("stageline.audit: ")[2]
    assert json.loads(audit)["request_id"] == "r-2"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_setting_has_one_spelling_everywhere(log_format: str) -> None:
    from gateway.app import stage_spec
    from gateway.config import load
    from stages.spec import StageSpec

    for config in (
        load(None, {"server.log_format": log_format}, {}),
        load(None, {}, {"STAGELINE_SERVER__LOG_FORMAT": log_format}),
    ):
        assert config.server.log_format == log_format
        spec = stage_spec(config, None, 1) | {"model": "m", "host": "127.0.0.1"}
        assert StageSpec.from_dict(spec).log_format == log_format
