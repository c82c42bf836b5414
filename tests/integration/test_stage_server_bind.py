"""A replica that holds no stage is bound to one, over real sockets: who is first, what it tells meanwhile, what can go wrong."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from stage_server_helpers import FIRST, LAST, MIDDLE, WHOLE, ToyLoader, ending, refusal, running, send, step, unbound

from stageline.errors import CheckpointError

STALE = ("FAILED_PRECONDITION", "STALE_EPOCH")
LOADING = ("FAILED_PRECONDITION", "STAGE_LOADING")
CLAIMED = ("FAILED_PRECONDITION", "STAGE_CLAIMED")


async def test_unbound_it_says_what_it_could_load() -> None:
    async with unbound() as (stage, _):
        described = await stage.describe()
        assert (described.start_layer, described.end_layer, described.num_layers) == (0, 0, 4)
        assert (described.bindable, described.fingerprint, described.model) == (True, "toy", "toy")
        assert described.memory_bytes == 4
        assert not described.HasField("loading")
        assert await stage.state() == "UNBOUND"
        assert await stage.health() == "SERVING"
        assert await refusal(stage.claim()) == ("FAILED_PRECONDITION", "STAGE_UNBOUND")
    async with running(MIDDLE) as stage:
        assert not (await stage.describe()).bindable
        assert await refusal(stage.bind(FIRST)) == ("FAILED_PRECONDITION", "STAGE_NOT_BINDABLE")


async def test_it_loads_in_the_background_and_is_then_a_stage_like_any_other() -> None:
    async with unbound() as (stage, loader):
        loader.gate.clear()
        epoch = await stage.bind(WHOLE, "me")
        await stage.until_state("LOADING")
        described = await stage.describe()
        loading = described.loading
        assert (described.owner_id, described.epoch, described.end_layer) == ("me", epoch, 0)
        assert (loading.start_layer, loading.end_layer, loading.done_bytes, loading.total_bytes) == (0, 4, 10, 20)
        assert await refusal(stage.claim("me")) == LOADING
        assert await refusal(stage.connect(epoch)) == LOADING
        await stage.renew(epoch)
        loader.gate.set()
        await stage.until_state("CLAIMED")
        described = await stage.describe()
        assert (described.start_layer, described.end_layer, described.kv_capacity_blocks) == (0, 4, 64)
        assert not described.HasField("loading")
        assert await refusal(stage.claim("other")) == CLAIMED, "who bound it comes first"
        stage.runner = loader.runner
        await stage.good_step(1, "me")
        assert loader.runner.executed == [1]


async def test_of_many_that_bind_at_once_one_is_granted() -> None:
    async with unbound() as (stage, loader):
        loader.gate.clear()
        asked = [stage.bind(FIRST if i % 2 else LAST, f"gateway {i}", epoch=0) for i in range(20)]
        answers = await asyncio.gather(*(refusal(one) for one in asked), return_exceptions=True)
        assert sorted(map(type, answers), key=str) == [AssertionError, *[tuple] * 19]
        assert {answer for answer in answers if isinstance(answer, tuple)} == {CLAIMED}
        assert len(loader.loads) == 1


async def test_the_same_bind_again_changes_nothing() -> None:
    async with unbound() as (stage, loader):
        loader.gate.clear()
        epoch = await stage.bind(LAST, "me", epoch=0)
        assert await stage.bind(LAST, "me", epoch=0) == epoch
        assert await refusal(stage.bind(FIRST, "me", epoch=0)) == LOADING
        assert await refusal(stage.bind(LAST, "me", epoch=epoch)) == LOADING
        loader.gate.set()
        await stage.until_state("CLAIMED")
        assert await stage.bind(LAST, "me", epoch=0) == epoch
        await stage.claim("me")
        assert await refusal(stage.bind(LAST, "me", epoch=0)) == STALE, "a call that comes late binds nothing again"
        assert loader.loads == ["2-4"]


async def test_a_claim_means_the_stage_that_was_described() -> None:
    async with unbound() as (stage, _):
        await stage.bind(FIRST, "me")
        await stage.until_state("CLAIMED")
        await stage.release(await stage.bind(LAST, "me"))  # after others saw the first stage
        await stage.until_state("SPARE")
        assert await refusal(stage.claim("other", layers=FIRST)) == ("FAILED_PRECONDITION", "STAGE_REBOUND")
        await stage.claim("other", layers=LAST)
    async with running(MIDDLE) as stage:
        assert await refusal(stage.claim(layers=LAST)) == ("FAILED_PRECONDITION", "STAGE_REBOUND")
        await stage.claim(layers=MIDDLE)


async def test_an_owner_that_is_gone_leaves_a_spare() -> None:
    async with unbound() as (stage, loader):
        loader.gate.clear()
        epoch = await stage.bind(LAST, "gone", lease_s=0.3)
        await asyncio.sleep(0.7)
        assert await refusal(stage.renew(epoch)) == STALE
        assert (await stage.describe()).owner_id == ""
        assert await refusal(stage.bind(FIRST, "other")) == LOADING
        loader.gate.set()
        await stage.until_state("SPARE")
        stage.runner = loader.runner
        await stage.good_step(1, "other")


async def test_released_while_it_loads() -> None:
    async with unbound() as (stage, loader):
        loader.gate.clear()
        await stage.release(await stage.bind(LAST, "me"))
        assert await stage.state() == "LOADING"
        loader.gate.set()
        await stage.until_state("SPARE")
        assert (await stage.claim("other")).epoch > 2


async def test_a_load_that_fails_leaves_it_unbound_and_says_why() -> None:
    async with unbound() as (stage, loader):
        loader.fault = CheckpointError("SHARD_UNREADABLE", "half of it is missing")
        epoch = await stage.bind(LAST, "me")
        await stage.until_state("UNBOUND")
        described = await stage.describe()
        assert described.load_failure == "SHARD_UNREADABLE: half of it is missing"
        assert (described.owner_id, described.HasField("loading")) == ("", False)
        assert await refusal(stage.renew(epoch)) == STALE
        loader.fault = None
        await stage.bind(WHOLE, "me")
        await stage.until_state("CLAIMED")
        assert (await stage.describe()).load_failure == ""
        stage.runner = loader.runner
        await stage.good_step(1, "me")


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ((0, 4), ("RESOURCE_EXHAUSTED", "STAGE_TOO_LARGE")),
        ((2, 5), ("INVALID_ARGUMENT", "LAYERS_OUT_OF_RANGE")),
        ((2, 2), ("INVALID_ARGUMENT", "LAYERS_OUT_OF_RANGE")),
    ],
)
async def test_a_stage_that_cannot_be_loaded_is_refused_at_once(layers, error) -> None:
    async with unbound(ToyLoader(max_layers=2)) as (stage, loader):
        assert await refusal(stage.bind(layers)) == error
        assert await stage.state() == "UNBOUND"
        assert (await stage.describe()).epoch == 0
        assert not loader.loads


async def test_what_is_wrong_with_a_bind() -> None:
    async with unbound() as (stage, loader):
        for owner, lease_s, reason in (("", 1.0, "OWNER_MISSING"), ("o", 0.0, "LEASE_NOT_POSITIVE")):
            assert await refusal(stage.bind(LAST, owner, lease_s=lease_s)) == ("INVALID_ARGUMENT", reason)
        assert await refusal(stage.bind(LAST, epoch=1)) == STALE
        stage.incarnation = "another"
        assert await refusal(stage.bind(LAST)) == ("FAILED_PRECONDITION", "WRONG_INCARNATION")
        stage.incarnation = stage.server.incarnation
        await stage.server.drain()
        assert await refusal(stage.bind(LAST)) == ("FAILED_PRECONDITION", "STAGE_DRAINING")
        assert not loader.loads


async def test_bound_to_another_stage_the_old_one_is_let_go_first() -> None:
    async with unbound() as (stage, loader):
        await stage.bind(WHOLE, "me")
        await stage.until_state("CLAIMED")
        stage.runner = loader.runner
        epoch = await stage.start("me")
        assert await refusal(stage.bind(FIRST, "other")) == CLAIMED
        assert await refusal(stage.bind(FIRST, "me")) == ("FAILED_PRECONDITION", "STAGE_CONNECTED")
        forward, results, watch = stage.forward(epoch), stage.results(epoch), await stage.watch(epoch)
        loader.runner.gate.clear()
        loader.runner.started.clear()
        await send(forward, epoch, step(1))
        await asyncio.to_thread(loader.runner.started.wait, 10)
        release = asyncio.create_task(stage.release(epoch))  # it answers once the kernel is done
        await asyncio.sleep(0.1)
        old = weakref.ref(loader.runner)
        bound = await stage.bind(LAST, "other")
        await stage.until_state("LOADING")
        assert loader.loads == ["0-4"], "the old stage still computes"
        assert await ending(results) == await refusal(forward) == await ending(watch) == STALE
        loader.gate.clear()
        loader.runner.gate.set()
        await release
        stage.runner = loader.runner = None
        async with asyncio.timeout(5):
            while loader.loads != ["0-4", "2-4"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        gc.collect()
        assert old() is None, "the stage before is still in memory"
        loader.gate.set()
        await stage.until_state("CLAIMED")
        described = await stage.describe()
        assert (described.start_layer, described.end_layer, described.epoch) == (2, 4, bound)
        stage.runner = loader.runner
        await stage.good_step(1, "other")


async def test_a_replica_that_stops_gives_its_load_up() -> None:
    async with unbound() as (stage, loader):
        loader.gate.clear()
        await stage.bind(LAST)
        await stage.server.stop()
        loader.gate.set()
        await asyncio.sleep(0.05)
        assert loader.runner is None
