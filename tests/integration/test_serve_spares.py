"""`stageline serve --stages.spares 1`: Serve runs a replica that holds no stage; it takes the place of one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import grpc
from test_serve import PROMPT, generation

from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.parity.test_model import reference
from tests.tiny import save_tiny, tiny_model


def test_a_spare_takes_the_place_of_a_killed_stage(tmp_path) -> None:
    folder = save_tiny(tmp_path / "tiny", tiny_model())
    command = ["serve", "--model", str(folder), "--layers", "0-1,1-3,3-4", "--dtype", "float32", "--grpc-port", "0",
               "--http-port", "0", "--kv-cache.num-blocks", "64", "--stages.spares", "1"]  # fmt: skip
    with (tmp_path / "stderr.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", *command], stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:1] == ["ready"], (tmp_path / "stderr.txt").read_text()[-4000:]
        stub = InferenceServiceStub(grpc.insecure_channel(line[2].removeprefix("grpc://")))
        end_s = time.monotonic() + 60
        while not (spares := stub.GetModel(pb.GetModelRequest()).spares):
            assert time.monotonic() < end_s, "no spare"
            time.sleep(0.1)
        [spare] = spares
        assert (spare.state, spare.layers) == ("unbound", "any")
        tokens: list[int] = []
        message = generation()
        message.stop.max_tokens = 300
        killed: int | None = None
        for response in stub.StreamGenerate(pb.StreamGenerateRequest(generation=message), timeout=120):
            tokens += [token for delta in response.choices for token in delta.token_ids]
            if len(tokens) >= 20 and killed is None:
                [pipeline] = stub.GetModel(pb.GetModelRequest()).pipelines
                killed = pipeline.stages[1].replicas[0].pid
                os.kill(killed, signal.SIGKILL)
        assert killed is not None
        assert tokens == reference(tiny_model(), PROMPT, 300)
        [pipeline] = stub.GetModel(pb.GetModelRequest()).pipelines
        assert pipeline.stages[1].replicas[0].pid == spare.pid, (tmp_path / "stderr.txt").read_text()[-4000:]
        while (replaced := stub.GetModel(pb.GetModelRequest()).spares[:1]) == [] or replaced[0].layers != "1-3":
            assert time.monotonic() < end_s + 30, "Serve brings no replacement, which is now the spare"
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
