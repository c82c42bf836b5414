"""`stageline serve --stages.spares 1`: Serve runs a replica that holds no stage; it takes the place of one that is killed."""

from __future__ import annotations

import os
import signal
import time

from test_serve import PROMPT, generation, pids, serving, stub

from stageline.inference.v1 import inference_service_pb2 as pb
from tests.parity.test_model import reference
from tests.tiny import tiny_model


def test_a_spare_takes_the_place_of_a_killed_stage(tmp_path) -> None:
    with serving(tmp_path, "--stages.spares", "1") as server:
        calls = stub(server)
        end_s = time.monotonic() + 60
        while not (spares := calls.GetModel(pb.GetModelRequest()).spares):
            assert time.monotonic() < end_s, "no spare"
            time.sleep(0.1)
        [spare] = spares
        assert (spare.state, spare.layers) == ("unbound", "any")
        tokens: list[int] = []
        message = generation()
        message.stop.max_tokens = 300
        killed: int | None = None
        for response in calls.StreamGenerate(pb.StreamGenerateRequest(generation=message), timeout=120):
            tokens += [token for delta in response.choices for token in delta.token_ids]
            if len(tokens) >= 20 and killed is None:
                killed = pids(server)[1]
                os.kill(killed, signal.SIGKILL)
        assert killed is not None
        assert tokens == reference(tiny_model(), PROMPT, 300)
        assert pids(server)[1] == spare.pid, (tmp_path / "stderr.txt").read_text()[-4000:]
        while (replaced := calls.GetModel(pb.GetModelRequest()).spares[:1]) == [] or replaced[0].layers != "1-3":
            assert time.monotonic() < end_s + 30, "Serve brings no replacement, which is now the spare"
            time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)
