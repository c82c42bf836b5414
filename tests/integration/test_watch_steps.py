"""Steps watched over gRPC while a toy pipeline serves, and `stageline timeline` on them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from engine_helpers import NUM_LAYERS, Cluster, byte_tokenizer, collect, request, until

from gateway.api.grpc.server import GrpcServer, serve_grpc
from gateway.api.service import Frontend
from gateway.cli import main
from stageline.operations.v1 import operations_service_pb2 as pb
from stageline.operations.v1 import operations_service_pb2_grpc as pb_grpc

DELAY_S = 0.01


@pytest.fixture
async def served():
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=DELAY_S)
    engine = await cluster.start()
    await until(engine.ready)
    server = await serve_grpc(Frontend(engine, byte_tokenizer(), None, engine.model), "127.0.0.1", 0)
    yield cluster, server
    await server.stop(0.0)
    await cluster.stop()


async def test_every_step_of_a_request_is_told(served: tuple[Cluster, GrpcServer]) -> None:
    cluster, server = served
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = pb_grpc.OperationsServiceStub(channel).StreamSteps(pb.StreamStepsRequest())
        assert not (await call.read()).steps, "the first message is empty: the watch stands"
        await collect(cluster.engine, request(range(1, 20), max_tokens=5))
        steps: list[pb.Step] = []
        async with asyncio.timeout(5):
            while sum(step.num_decode_tokens for step in steps) < 4:
                steps += (await call.read()).steps
        call.cancel()
    assert sum(step.num_prefill_tokens for step in steps) == 19
    assert [step.step_id for step in steps] == list(range(steps[0].step_id, steps[0].step_id + len(steps)))
    for step in steps:
        assert [stage.layers for stage in step.stages] == ["0-2", f"2-{NUM_LAYERS}"]
        times = [step.sent_ns]
        for stage in step.stages:  # one host: one clock
            times += [stage.received_ns, stage.started_ns, stage.finished_ns]
            assert stage.finished_ns - stage.started_ns >= DELAY_S * 1e9
            assert stage.cpu_ns < stage.finished_ns - stage.started_ns, "a toy's step sleeps"
        assert [*times, step.returned_ns] == sorted([*times, step.returned_ns])
    await until(lambda: not cluster.engine._keeper.feed.watched)  # a client that is gone costs nothing


async def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = await asyncio.to_thread(main, ["timeline", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


async def test_the_command(
    served: tuple[Cluster, GrpcServer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster, server = served
    address = f"127.0.0.1:{server.port}"
    requests = asyncio.gather(*(collect(cluster.engine, request([i, 7], max_tokens=60)) for i in range(3)))
    file = tmp_path / "trace.json"
    common = ("--address", address, "--seconds", "0.6")
    code, out, _ = await run_command(capsys, *common, "--output", "json", "--output-file", str(file))
    assert code == 0
    report = json.loads(out)
    assert [stage["layers"] for stage in report["stages"]] == ["0-2", f"2-{NUM_LAYERS}"]
    assert all(0.3 < stage["computing"] <= 1 for stage in report["stages"])
    assert report["dropped"] == 0
    events = json.loads(file.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2 * report["steps"]
    await requests
    code, out, err = await run_command(capsys, *common)
    assert (code, out) == (1, "")
    assert "NO_STEPS" in err
    assert "send requests" in err


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_bad_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", "--address", "127.0.0.1:1", f"--seconds={seconds}"]) == 2
    assert "--seconds" in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", "--address", "127.0.0.1:1", "--seconds", "1"]) == 1
    assert "does not answer" in capsys.readouterr().err


async def test_a_file_that_cannot_be_written(
    served: tuple[Cluster, GrpcServer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster, server = served
    requests = asyncio.gather(collect(cluster.engine, request([5, 7], max_tokens=40)))
    missing = tmp_path / "no" / "trace.json"
    code, _, err = await run_command(
        capsys, "--address", f"127.0.0.1:{server.port}", "--seconds", "0.3", "--output-file", str(missing)
    )
    assert code == 2
    assert "--output-file" in err
    await requests
