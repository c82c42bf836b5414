"""A stage process is stopped (SIGSTOP) past its lease and goes on later: a spare takes over, the sleeper finds itself fenced."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from gateway.engine import Engine, EngineSettings
from gateway.pipelines.discovery import Registry, StaticDiscovery, describe
from gateway.tokenizer import load_tokenizer
from gateway.types import ModelInfo
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.checkpoint import open_checkpoint
from tests.integration.engine_helpers import collect, request, until
from tests.tiny import save_tiny

NUM_TOKENS = 120


def start_stage(folder, layers: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "--model", str(folder), "--layers", layers, "--port", "0", "--batch-invariant",
         "--dtype", "float32", "--num-blocks", "96", "--num-threads", "1", "--debug-kv"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline().split()[1].removeprefix("grpc://")


@pytest.mark.parametrize("paused", [0, 1])
async def test_a_paused_stage_is_replaced_and_fenced(paused: int, tmp_path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    started = [await asyncio.to_thread(start_stage, folder, layers) for layers in ("0-2", "2-4")]
    checkpoint = open_checkpoint(str(folder))
    registry = Registry()
    engine = Engine(
        model=ModelInfo(
            name="tiny", fingerprint=checkpoint.fingerprint, max_context_tokens=400, vocab_size=checkpoint.config.vocab_size
        ),
        tokenizer=load_tokenizer(checkpoint.path),
        registry=registry,
        settings=EngineSettings(lease_s=2.0, check_integrity=True),
        fingerprint=checkpoint.fingerprint,
    )  # fmt: skip
    discovery = StaticDiscovery([address for _, address in started], registry)
    asked = [
        request((7 * i + 1, 5, 9), max_tokens=NUM_TOKENS, temperature=0.9 * (i % 2), seed=i, repetition_penalty=1.2)
        for i in range(6)
    ]
    try:
        await engine.start()
        await discovery.start()
        await asyncio.wait_for(engine.wait_ready(), 60)
        undisturbed = [answer[0].token_ids for answer in await asyncio.gather(*(collect(engine, one) for one in asked))]
        await discovery.stop()
        spare = await asyncio.to_thread(start_stage, folder, ("0-2", "2-4")[paused])
        started.append(spare)
        discovery = StaticDiscovery([address for _, address in started], registry)
        await discovery.start()
        tasks = [asyncio.create_task(collect(engine, one)) for one in asked]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks), "pause the stage while streams run"
        in_use = {stage.address: stage.pid for stage in engine.pipelines()[0].stages}
        sleeper, address = started[paused]
        assert in_use[address] == sleeper.pid
        os.kill(sleeper.pid, signal.SIGSTOP)
        disturbed = [answer[0].token_ids for answer in await asyncio.wait_for(asyncio.gather(*tasks), 60)]
        assert disturbed == undisturbed
        assert spare[1] in {stage.address for stage in engine.pipelines()[0].stages}
        os.kill(sleeper.pid, signal.SIGCONT)
        async with asyncio.timeout(20):
            while (found := await describe(address, 5)).owner_id:  # noqa: ASYNC110 (its lease has run out meanwhile)
                await asyncio.sleep(0.1)
        assert found.state == pb.STAGE_STATE_SPARE
        await until(engine.ready)
        again = [answer[0].token_ids for answer in await asyncio.gather(*(collect(engine, one) for one in asked))]
        assert again == undisturbed
    finally:
        await discovery.stop()
        await engine.stop()
        for process, _ in started:
            process.kill()
            process.wait()
