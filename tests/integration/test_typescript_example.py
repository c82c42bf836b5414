"""examples/typescript, compiled and run by node against gateways that answer, refuse, are slow and die."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from process_nursery import ToyGateway

from stageline.client import Client
from stageline.inference.v1 import generation_pb2 as gen

ROOT = Path(__file__).parents[2]
PROMPT, SEED, NUM_TOKENS = "abc", 11, 150


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled example, beside its packages."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed (Debian: apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("typescript")
    for name in ("package.json", "tsconfig.json", "client.ts"):
        shutil.copy(ROOT / "examples/typescript" / name, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=1"]
    try:
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install took more than 120 s: no npm registry within reach")
    if done.returncode != 0:
        pytest.skip(f"npm install failed, no npm registry within reach: {done.stderr[-300:]}")
    subprocess.run(["npx", "--no-install", "tsc"], cwd=folder, check=True, timeout=120)
    return folder / "dist/client.js"


def started(program: Path, address: str, **environ: object) -> subprocess.Popen[bytes]:
    """The example, asking for NUM_TOKENS."""
    settings = {
        "STAGELINE_PROTO": ROOT / "proto", "STAGELINE_PLAIN_TEXT": 1, "STAGELINE_SEED": SEED,
        "STAGELINE_MAX_TOKENS": NUM_TOKENS, "STAGELINE_TIMEOUT_MS": 60_000, **environ,
    }  # fmt: skip
    return subprocess.Popen(
        ["node", str(program), address, PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
    )  # fmt: skip


def expected(address: str) -> str:
    """What the Python client hears."""
    what = gen.Generation(
        text=PROMPT, sampling=gen.SamplingParams(seed=SEED), stop=gen.StopConditions(max_tokens=NUM_TOKENS)
    )
    with Client(address) as client:
        return client.generate(what).choices[0].text


def test_it_streams_the_answer_and_goes_on_after_the_gateway_died(program: Path, gateway: ToyGateway) -> None:
    answer = expected(gateway.address)
    calm = started(program, gateway.address)
    out, err = calm.communicate(timeout=60)
    assert (out.decode(), err, calm.returncode) == (answer + "\n", b"", 0)

    disturbed = started(program, gateway.address)
    assert disturbed.stdout is not None
    head = disturbed.stdout.read(1)  # it is in mid-stream
    gateway.kill()
    again = threading.Timer(0.3, gateway.start)
    again.start()
    rest, err = disturbed.communicate(timeout=60)
    again.join()
    assert disturbed.returncode == 0, err.decode()
    assert (head + rest).decode() == answer + "\n", "a token came twice, or never"
    assert b"[UNAVAILABLE; " in err


def test_it_says_why_it_was_refused_and_keeps_its_deadline(program: Path, gateway: ToyGateway) -> None:
    refused = started(program, gateway.address, STAGELINE_MAX_TOKENS=100_000)
    late = started(program, gateway.address, STAGELINE_TIMEOUT_MS=150)
    gone = started(program, "127.0.0.1:9", STAGELINE_TIMEOUT_MS=600)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert err.startswith(b"INVALID_ARGUMENT [CONTEXT_LENGTH_EXCEEDED] ")
    assert b'"max_context_tokens":"200"' in err
    _, err = late.communicate(timeout=60)
    assert (late.returncode, err[:17]) == (1, b"DEADLINE_EXCEEDED")
    begun_s = time.monotonic()
    _, err = gone.communicate(timeout=60)
    assert gone.returncode == 1
    assert err.rstrip().splitlines()[-1].startswith((b"UNAVAILABLE [] ", b"DEADLINE_EXCEEDED [] "))
    assert time.monotonic() - begun_s < 30
