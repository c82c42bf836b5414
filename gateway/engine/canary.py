"""The canary: one greedy token through every stage proves a pipeline before clients depend on it, and while it idles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.engine.choice import ChoiceState
from gateway.engine.deltas import Deltas
from gateway.engine.lane import Lane
from gateway.pipelines.pipeline import Pipeline
from gateway.scheduler import PROBE_PRIORITY
from gateway.types import GenerateRequest, SamplingParams
from stageline.errors import StagelineError, UnavailableError


async def prove(
    lane: Lane,
    pipeline: Pipeline,
    make_choice: Callable[[GenerateRequest, int, Deltas], ChoiceState],
    *,
    timeout_s: float,
) -> None:
    """Return when the canary came back; other sequences of the lane may run beside it.

    Raises the pipeline's cause when it breaks, the step's error when a stage could not execute it, UnavailableError
    CANARY_TIMEOUT when nothing comes back in time.
    """
    request = GenerateRequest(
        request_id="canary",
        prompt_token_ids=(0,),
        sampling=SamplingParams(temperature=0, max_tokens=1),
        # Ahead of every request: in the first micro-batch, however many sequences wait to be recomputed.
        priority=PROBE_PRIORITY,
        use_prefix_cache=False,  # it is to be computed
    )
    deltas = Deltas()
    choice = make_choice(request, 0, deltas)
    lane.adopt(choice)
    answer = asyncio.create_task(deltas.get())
    broken = asyncio.create_task(pipeline.broken.wait())
    try:
        await asyncio.wait({answer, broken}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout_s)
        if pipeline.cause is not None:
            raise pipeline.cause
        if not answer.done():
            raise UnavailableError("CANARY_TIMEOUT", f"no canary came back from the pipeline within {timeout_s} s")
        if isinstance(delta := answer.result(), StagelineError):
            raise delta
    finally:
        answer.cancel()
        broken.cancel()
        lane.cancel(choice)


async def keep_proving(
    lane: Lane,
    pipeline: Pipeline,
    make_choice: Callable[[GenerateRequest, int, Deltas], ChoiceState],
    *,
    interval_s: float,
    timeout_s: float,
) -> None:
    """Send a canary whenever no step came back for `interval_s` and none is out; steps of requests prove as much. Returns
    never; raises what `prove` raises."""
    while True:
        quiet_s = lane.quiet_s()
        if quiet_s >= interval_s and not lane.busy:
            await prove(lane, pipeline, make_choice, timeout_s=timeout_s)
        await asyncio.sleep(max(interval_s - quiet_s, interval_s / 4))
