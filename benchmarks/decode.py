"""Decode throughput through the gRPC door, on the demo's model: `make bench`. Prints one JSON object.

128-token prompts and 64 new tokens, greedy, 1 and 16 streams; the median of 5 runs of each, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from gateway.demo import fetch_model
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5


def stream(stub: InferenceServiceStub, seed: int) -> tuple[float, float]:
    """Run one request; when its first and its last token came, in seconds of a monotonic clock."""
    ids = [(31 * seed + 7 * i) % 40_000 + 100 for i in range(PROMPT_TOKENS)]
    generation = gen.Generation(
        token_ids=gen.TokenIds(ids=ids),
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=NEW_TOKENS, ignore_eos=True),
    )
    times = [
        time.perf_counter()
        for response in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation))
        if response.choices
    ]
    return times[0], times[-1]


def decode_rate(stub: InferenceServiceStub, streams: int) -> float:
    """Tokens a second of all streams together, from the first token of any to the last token of all."""
    with ThreadPoolExecutor(streams) as pool:
        spans = list(pool.map(lambda seed: stream(stub, seed), range(streams)))
    began, ended = min(first for first, _ in spans), max(last for _, last in spans)
    return streams * (NEW_TOKENS - 1) / (ended - began)


def main() -> int:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the demo's SmolLM2-135M")
    parser.add_argument("--stages", type=int, default=2)
    args = parser.parse_args()
    model = args.model or str(fetch_model())
    command = [sys.executable, "-m", "gateway.cli", "serve", "--model", model, "--stages", str(args.stages),
               "--grpc-port", "0", "--http-port", "0"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        if len(ready) != 3:
            return server.wait() or 1
        with grpc.insecure_channel(ready[2].removeprefix("grpc://")) as channel:
            stub = InferenceServiceStub(channel)
            decode_rate(stub, 1)  # warm
            rates: dict[int, list[float]] = {1: [], 16: []}
            for _ in range(REPEATS):
                for streams, runs in rates.items():
                    runs.append(decode_rate(stub, streams))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=90)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "what": "decode, tokens a second of all streams together",
        "model": os.path.basename(model),
        "stages": args.stages,
        "dtype": "bfloat16",
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "commit": commit.stdout.strip(),
        "median": {str(streams): round(statistics.median(runs), 1) for streams, runs in rates.items()},
        "runs": {str(streams): [round(rate, 1) for rate in runs] for streams, runs in rates.items()},
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
