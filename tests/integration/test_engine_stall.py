"""A stage that hangs in its kernel answers every call and moves nothing: the gateway gives up on it, a spare goes on."""

from __future__ import annotations

import asyncio
import threading

import pytest
from engine_helpers import NUM_LAYERS, Cluster, collect, expected_tokens, request, until

from stageline.errors import InternalError
from stages.replica import StageReplica, StageSpec
from tests.tiny import save_tiny


async def test_a_hung_kernel_is_noticed_and_a_spare_takes_over(caplog):
    cluster = Cluster()
    release = threading.Event()
    try:
        first = await cluster.add_stage(0, 2, delay_s=0.004)
        await cluster.add_stage(2, NUM_LAYERS, delay_s=0.004)
        engine = await cluster.start(stall_timeout_s=1.0, lease_s=4.0)
        await until(engine.ready)
        prompts = [(1, 2, 3), tuple(range(20)), (9,)]
        tasks = [asyncio.create_task(collect(engine, request(prompt, max_tokens=60))) for prompt in prompts]
        await asyncio.sleep(0.1)
        compute = first.runner.execute

        def hang(batch, *rest):
            release.wait(60)
            return compute(batch, *rest)

        first.runner.execute = hang
        await cluster.add_stage(0, 2)  # the spare
        await asyncio.wait(tasks, timeout=20)
        for prompt, task in zip(prompts, tasks, strict=True):
            assert (await task)[0].token_ids == expected_tokens(prompt, 60, num_stages=2)
        assert "STAGE_STALLED" in caplog.text
        assert first.record.address in caplog.text
        assert first.server.busy_s() > 1.0
    finally:
        release.set()
        await cluster.stop()


async def test_a_replica_that_hangs_reports_itself_unhealthy(tmp_path):
    spec = StageSpec(
        model=str(save_tiny(tmp_path / "m")), start_layer=0, end_layer=4, dtype="float32", stall_timeout_s=0.2
    )
    replica = StageReplica(spec)
    await replica.start()
    try:
        replica.check_health()
        server = replica._server
        server._wired.running_since_s = asyncio.get_running_loop().time() - 1.0  # the loop's clock is time.monotonic
        with pytest.raises(InternalError) as caught:
            replica.check_health()
        assert caught.value.reason == "STAGE_STALLED"
    finally:
        await replica.stop()
