"""Who owns a stage, over real sockets: claims, epochs, leases, fencing, draining, failure."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest
import torch
from engine_helpers import until
from stage_server_helpers import FIRST, Client, ending, push, refusal, result, running, send, step

from stageline.stage.v1 import stage_service_pb2 as pb

STALE = ("FAILED_PRECONDITION", "STALE_EPOCH")


async def test_two_owners() -> None:
    async with running() as stage:
        epoch = await stage.start("first")
        assert await refusal(stage.claim("second")) == ("FAILED_PRECONDITION", "STAGE_CLAIMED")
        described = await stage.describe()
        assert (described.owner_id, described.epoch) == ("first", epoch)
        assert await stage.state() == "CONNECTED"
        await stage.renew(epoch)
        await stage.release(epoch)
        assert await stage.state() == "SPARE"
        await stage.good_step(1, "second")


async def test_the_same_owner_claims_again_under_a_higher_epoch() -> None:
    async with running() as stage:
        first = await stage.start("me")
        forward, results, watch = stage.forward(first), stage.results(first), await stage.watch(first)
        await send(forward, first, step(1))
        assert (await result(results)).step_id == 1
        again = await stage.claim("me")
        assert again.epoch > first
        assert (again.previous_epoch, again.last_executed_step) == (first, 1)
        assert await stage.state() == "CLAIMED"
        assert await ending(results) == await refusal(forward) == await ending(watch) == STALE
        await stage.good_step(1, "me")


async def test_every_call_with_an_old_epoch_is_refused() -> None:
    async with running() as stage:
        old = await stage.start()
        new = await stage.start()
        for epoch in (old, new + 1, 0, (1 << 64) - 1):
            assert await refusal(stage.connect(epoch)) == STALE
            assert await refusal(stage.renew(epoch)) == STALE
            assert await refusal(stage.release(epoch)) == STALE
            assert await refusal(stage.watch(epoch)) == STALE
            assert await refusal(stage.results(epoch).read()) == STALE
            forward = stage.forward(epoch)
            await push(forward, epoch, [step(1)])
            assert await refusal(forward) == STALE
        forward = stage.forward(new)  # the stream is current, the frame is not
        await push(forward, old, [step(1)])
        assert await refusal(forward) == STALE
        assert stage.runner.executed == []
        assert await stage.state() == "CONNECTED"


async def test_another_incarnation_is_refused_everywhere() -> None:
    async with running() as stage:
        gone = ("FAILED_PRECONDITION", "WRONG_INCARNATION")
        own, stage.incarnation = stage.incarnation, "another"
        assert await refusal(stage.claim()) == gone
        stage.incarnation = ""
        assert await refusal(stage.claim()) == gone
        stage.incarnation = own
        epoch = await stage.start()
        stage.incarnation = "another"
        assert await refusal(stage.renew(epoch)) == gone
        assert await refusal(stage.release(epoch)) == gone
        assert await refusal(stage.watch(epoch)) == gone
        assert (await refusal(stage.forward(epoch)))[0] == "FAILED_PRECONDITION"
        assert (await refusal(stage.results(epoch).read()))[0] == "FAILED_PRECONDITION"
        stage.incarnation = own
        assert await stage.state() == "CONNECTED"
        assert stage.runner.executed == []


async def test_min_epoch_is_honoured() -> None:
    async with running() as stage:
        assert (await stage.claim(min_epoch=17)).epoch == 17
        assert (await stage.claim(min_epoch=3)).epoch == 18
        assert (await stage.claim(min_epoch=0)).epoch == 19
        assert await refusal(stage.renew(18)) == STALE
        high = (await stage.claim(min_epoch=1 << 40)).epoch
        assert high == 1 << 40
        await stage.good_step()


@pytest.mark.parametrize("lease_s", [0.0, -1.0, math.inf, -math.inf, math.nan])
async def test_a_lease_that_is_no_time_is_refused(lease_s: float) -> None:
    async with running() as stage:
        assert (await refusal(stage.claim(lease_s=lease_s)))[0] == "INVALID_ARGUMENT"
        assert (await stage.describe()).epoch == 0
        await stage.good_step()


async def test_an_owner_needs_a_name() -> None:
    async with running() as stage:
        assert (await refusal(stage.claim("")))[0] == "INVALID_ARGUMENT"
        assert await stage.state() == "SPARE"
        await stage.good_step()


async def test_a_lease_that_runs_out_ends_the_streams_and_frees_the_stage() -> None:
    async with running() as stage:
        epoch = await stage.start("paused", lease_s=0.4)
        forward, results, watch = stage.forward(epoch), stage.results(epoch), await stage.watch(epoch)
        await send(forward, epoch, step(1))
        assert (await result(results)).step_id == 1
        assert await asyncio.gather(ending(results, 2), refusal(forward, 2), ending(watch, 2)) == [STALE] * 3
        assert await stage.state() == "SPARE"
        assert (await stage.describe()).owner_id == ""
        assert await refusal(stage.renew(epoch)) == STALE
        claim = await stage.claim("other")
        assert claim.epoch > epoch
        assert (claim.previous_epoch, claim.last_executed_step) == (epoch, 1)


async def test_renewals_keep_a_lease() -> None:
    async with running() as stage:
        epoch = await stage.start(lease_s=0.6)
        forward, results = stage.forward(epoch), stage.results(epoch)
        for number in range(1, 9):  # 1.6 s
            await asyncio.sleep(0.2)
            await stage.renew(epoch)
            await send(forward, epoch, step(number))
            assert (await result(results)).step_id == number
            assert (await stage.renew(epoch)).last_executed_step == number
        assert await stage.state() == "CONNECTED"


async def test_an_expired_owner_is_fenced() -> None:
    """It does not notice: it goes on sending steps while and after its lease runs out."""
    async with running(delay_s=0.02) as stage:
        epoch = await stage.start("paused", lease_s=0.4)
        forward = stage.forward(epoch)
        results = stage.results(epoch)
        reading = asyncio.create_task(ending(results, 5))
        sending = asyncio.create_task(push(forward, epoch, [step(number) for number in range(1, 2000)]))
        await until(lambda: len(stage.runner.executed) > 3)
        while (claimed := await claim_or_none(stage, "other")) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        executed = list(stage.runner.executed)
        assert claimed.previous_epoch == epoch
        assert claimed.last_executed_step == executed[-1]
        await asyncio.sleep(0.3)
        assert stage.runner.executed == executed
        await sending
        assert await refusal(forward) == await reading == STALE
        again = stage.forward(epoch)
        await push(again, epoch, [step(5000)])
        assert await refusal(again) == STALE
        assert stage.runner.executed == executed
        await stage.connect(claimed.epoch)


async def claim_or_none(stage: Client, owner: str) -> pb.ClaimResponse | None:
    try:
        return await stage.claim(owner)
    except grpc.aio.AioRpcError:
        return None


async def test_a_claim_waits_for_the_running_kernel_and_drops_what_is_queued() -> None:
    async with running() as stage:
        epoch = await stage.start()
        forward = stage.forward(epoch)
        stage.runner.gate.clear()
        await push(forward, epoch, [step(number) for number in range(1, 6)])
        await until(stage.runner.started.is_set)
        assert (await stage.renew(epoch)).running_step == 1
        claiming = asyncio.create_task(stage.claim())
        await asyncio.sleep(0.2)
        assert not claiming.done()
        stage.runner.gate.set()
        claim = await asyncio.wait_for(claiming, 5)
        assert (claim.previous_epoch, claim.last_executed_step) == (epoch, 1)
        await stage.connect(claim.epoch)
        await asyncio.sleep(0.1)
        assert stage.runner.executed == [1]
        results = stage.results(claim.epoch)  # nothing of the old epoch comes out of it
        new = stage.forward(claim.epoch)
        await send(new, claim.epoch, step(1, 3))
        assert (await result(results)).step_id == 1
        assert stage.runner.executed == [1, 1]


@pytest.mark.parametrize("end", ["release", "expiry", "claims that were never connected"])
async def test_a_claim_tells_of_the_last_epoch_that_was_connected(end: str) -> None:
    async with running() as stage:
        first = await stage.claim()
        assert (first.previous_epoch, first.last_executed_step) == (0, 0)
        epoch = await stage.start(lease_s=30.0 if end != "expiry" else 0.5)
        forward, results = stage.forward(epoch), stage.results(epoch)
        await push(forward, epoch, [step(number) for number in range(1, 8)])
        assert [(await result(results)).step_id for _ in range(7)] == list(range(1, 8))
        if end == "release":
            await stage.release(epoch)
        elif end == "expiry":
            await ending(results, 3)
        else:
            for _ in range(3):
                await stage.claim()
        claim = await stage.claim("o")
        assert (claim.previous_epoch, claim.last_executed_step) == (epoch, 7)


async def test_a_number_of_blocks_the_stage_does_not_have_is_refused() -> None:
    async with running() as stage:
        epoch = (await stage.claim()).epoch
        for num_blocks in (0, 65, (1 << 32) - 1):
            assert (await refusal(stage.connect(epoch, num_blocks=num_blocks)))[0] == "INVALID_ARGUMENT"
        assert await stage.state() == "CLAIMED"
        await stage.connect(epoch, num_blocks=64)
        assert await stage.state() == "CONNECTED"


async def test_the_last_stage_takes_no_neighbour_and_others_need_one() -> None:
    async with running() as last, running(FIRST) as first:
        epoch = (await last.claim()).epoch
        assert (await refusal(last.connect(epoch, first)))[0] == "INVALID_ARGUMENT"
        epoch = (await first.claim()).epoch
        assert (await refusal(first.connect(epoch)))[0] == "INVALID_ARGUMENT"
        assert [await last.state(), await first.state()] == ["CLAIMED", "CLAIMED"]


async def test_draining_is_told_serves_on_and_takes_no_claim() -> None:
    async with running() as stage:
        epoch = await stage.start()
        assert await stage.health() == await stage.health("") == "SERVING"
        early = await stage.watch(epoch)
        await stage.server.drain()
        late = await stage.watch(epoch)
        for watch in (early, late):
            assert (await asyncio.wait_for(watch.read(), 2)).HasField("draining")
        assert await stage.health() == await stage.health("") == "NOT_SERVING"
        for owner in ("o", "other"):
            assert await refusal(stage.claim(owner)) == ("FAILED_PRECONDITION", "STAGE_DRAINING")
        forward, results = stage.forward(epoch), stage.results(epoch)
        await send(forward, epoch, step(1))
        assert (await result(results)).step_id == 1
        await stage.connect(epoch)  # its owner may wire it anew; it drains all the same
        assert await stage.state() == "DRAINING"
        await stage.renew(epoch)
        await stage.release(epoch)
        assert await stage.state() == "DRAINING"
        assert await refusal(stage.claim()) == ("FAILED_PRECONDITION", "STAGE_DRAINING")
        assert await stage.health() == "NOT_SERVING"


async def test_a_claim_granted_before_draining_can_still_be_wired() -> None:
    async with running() as stage:
        epoch = (await stage.claim()).epoch
        await stage.server.drain()
        await stage.connect(epoch)
        assert await stage.state() == "DRAINING"
        forward, results = stage.forward(epoch), stage.results(epoch)
        await send(forward, epoch, step(1))
        assert (await result(results)).step_id == 1


async def test_a_spare_that_drains_is_not_claimable() -> None:
    async with running() as stage:
        await stage.server.drain()
        assert await stage.state() == "DRAINING"
        assert await refusal(stage.claim()) == ("FAILED_PRECONDITION", "STAGE_DRAINING")
        assert await stage.health() == "NOT_SERVING"


async def test_a_lost_device_ends_the_stage() -> None:
    """Every later step would fail too: the owner hears at once, and nobody can claim the stage again."""
    async with running() as stage:
        epoch = await stage.start()
        stage.runner.faults[2] = torch.AcceleratorError("the device is lost")
        forward, results, watch = stage.forward(epoch), stage.results(epoch), await stage.watch(epoch)
        await push(forward, epoch, [step(1), step(2), step(3)])
        assert (await result(results)).step_id == 1
        assert (await asyncio.gather(ending(results, 3), refusal(forward, 3), ending(watch, 3))) == [STALE] * 3
        assert stage.runner.executed == [1, 2]
        assert isinstance(stage.server.failure, torch.AcceleratorError)
        assert await stage.health() == await stage.health("") == "NOT_SERVING"
        assert await refusal(stage.claim()) == ("FAILED_PRECONDITION", "STAGE_FAILED")
        assert await refusal(stage.connect(epoch)) == STALE
        assert await stage.state() == "DRAINING"
