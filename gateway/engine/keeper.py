"""The keeper: opens a lane over every complete chain of replicas and keeps it on a pipeline when stages die.

Over 400 lines: forming, draining, moving and ending are states of one loop a lane, and read each other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Callable

from gateway.engine.canary import keep_proving, prove
from gateway.engine.choice import ChoiceState
from gateway.engine.deltas import Deltas
from gateway.engine.drain import Action, Situation, choose, reopen_wait_s, stays
from gateway.engine.lane import Lane
from gateway.engine.ownership import pipelines_taken
from gateway.engine.poison import Restarts, StageProgress
from gateway.engine.settings import EngineSettings
from gateway.engine.status import replica_status
from gateway.engine.suspects import ASK_TIMEOUT_S, SUSPECT_S, Suspects
from gateway.engine.takeover import WAIT_PERIOD_S, TakeoverTimes, places
from gateway.engine.watch import StepFeed
from gateway.metrics import Metrics
from gateway.pipelines.binder import Binder
from gateway.pipelines.binding import choose_bindings
from gateway.pipelines.discovery import Registry, ReplicaRecord, new_owner_id
from gateway.pipelines.form import Chain, chain
from gateway.pipelines.pipeline import Pipeline
from gateway.scheduler import Scheduler
from gateway.types import GenerateRequest, ReplicaStatus
from stageline.errors import StagelineError, UnavailableError
from stages.partition import LayerRange

logger = logging.getLogger("stageline.gateway")

DRAIN_PERIOD_S = 0.1  # how often a draining pipeline is looked at


MakeChoice = Callable[[GenerateRequest, int, Deltas], ChoiceState]


class Keeper:
    """All lanes of an engine. Lives on one event loop."""

    def __init__(
        self,
        registry: Registry,
        settings: EngineSettings,
        fingerprint: str,
        make_choice: MakeChoice,
        metrics: Metrics,
    ) -> None:
        self.lanes: list[Lane] = []
        self.feed = StepFeed()
        self.changed = asyncio.Event()  # replaced at every change of membership or readiness
        self._membership = asyncio.Event()  # replaced at every change of membership
        self._registry, self._settings, self._fingerprint = registry, settings, fingerprint
        self._make_choice, self._metrics = make_choice, metrics
        self.open_pipelines: set[Pipeline] = set()  # those that may hold leases, streams and tasks
        self._owner_id = new_owner_id()
        self._lane_numbers = itertools.count()
        self._times = TakeoverTimes()
        self._given_up_s: deque[float] = deque()  # when lanes lost the replicas that they did not wait for
        self._patient_until_s = 0.0
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects = Suspects(
            owner_id=self._owner_id, busy_s=settings.stall_timeout_s, lease_s=settings.lease_s,
            access=settings.stage_access,
        )  # fmt: skip
        self._binder = Binder(
            registry, owner_id=self._owner_id, lease_s=settings.lease_s, access=settings.stage_access,
            on_change=self._on_membership,
        )  # fmt: skip

    def start(self) -> None:
        """Begin to form pipelines as replicas appear."""
        self._registry.on_change = self._on_membership
        self._binder.start()
        if self._settings.eager_pipelines is not None:
            # The jitter keeps gateways that began together from asking together.
            patience_s = self._settings.patience_s * random.uniform(1.0, 1.2)
            self._patient_until_s = time.monotonic() + patience_s
            asyncio.get_running_loop().call_later(patience_s, self._on_membership)
        self._on_membership()

    async def stop(self) -> None:
        """Give every stage back."""
        self._registry.on_change = lambda: None
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self._binder.stop(), return_exceptions=True)

    def notify(self) -> None:
        """Wake whoever waits for `changed`."""
        self.changed.set()
        self.changed = asyncio.Event()

    def all_taken(self) -> bool:
        """Whether there is no pipeline here because other gateways have all stages that live."""
        if any(lane.pipeline is not None for lane in self.lanes):
            return False
        return self._suspects.all_taken(self._registry.replicas())

    def spares(self) -> tuple[ReplicaStatus, ...]:
        """Replicas in no pipeline."""
        return tuple(replica_status(record, "spare") for record in self._free(None))

    def _on_membership(self) -> None:
        """Open a lane for every complete chain of replicas that no lane uses; lanes that lost theirs come first."""
        if self._stopped:
            return
        self._membership.set()
        self._membership = asyncio.Event()
        self.notify()
        known = {record.incarnation for record in self._registry.replicas()}
        known |= {stage.incarnation for lane in self.lanes for stage in lane.stages}  # Serve lists none that drains
        self._suspects.forget_all_but(known)
        waiting = sum(not lane.stages for lane in self.lanes)
        chains, _ = chain(self._free(None), self._fingerprint)
        for _ in range(min(len(chains) - waiting, self._num_allowed() - len(self.lanes))):
            lane = Lane(
                str(next(self._lane_numbers)),
                self._make_scheduler,
                self.feed,
                self._metrics,
                unready_after_s=self._settings.unready_after_s,
                check_integrity=self._settings.check_integrity,
            )
            self.lanes.append(lane)
            if self._given_up_s:
                self._times = self._times.after(replacing_s=time.monotonic() - self._given_up_s.popleft())
            task = asyncio.create_task(self._keep(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _num_allowed(self) -> int:
        """How many lanes there may be by now."""
        eager = self._settings.eager_pipelines
        return 1 << 30 if eager is None or time.monotonic() >= self._patient_until_s else eager

    def _make_scheduler(self, pipeline: Pipeline) -> Scheduler:
        return Scheduler(
            num_blocks=pipeline.num_blocks,
            block_size_tokens=pipeline.block_size_tokens,
            max_in_flight=pipeline.max_in_flight,
            num_stages=len(pipeline.stages),
            limits=self._settings.limits(),
        )

    async def _keep(self, lane: Lane) -> None:
        """Keep a lane on a pipeline: open one, prove it with a canary, wait until it breaks, begin again.

        Sequences of a lost pipeline move where another one brings their next token sooner. A lane without a chain and
        without sequences ends while another one stands.
        """
        restarts, proven = Restarts(), False
        cut: tuple[LayerRange, ...] = ()
        lost_s = time.monotonic()
        # Since then: something was missing; a spare loaded it; what was lost had said that it would stop.
        missed = bound = drained = False
        while True:
            stages = self._pick(self._suspects.trusted(self._free(lane)))
            if stages is None:
                missed = True
                self._bind_spares(lane, cut)
            loading = bool(self._binder.loading(lane.name))
            bound |= loading
            others = self._standing_beside(lane)
            if others:
                ready_in_s = self._times.ready_in_s(
                    replaced=stages is not None,
                    loading=loading,
                    lost_for_s=time.monotonic() - lost_s,
                    num_failed_attempts=restarts.num_failed_attempts,
                )
                self._move(lane, others, ready_in_s)
            if stages is None and (others or loading):  # better than to try again what was lost
                if others and not lane.remainders():
                    self._end(lane)
                    if proven and not drained:
                        self._given_up_s.append(lost_s)
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), WAIT_PERIOD_S if others else SUSPECT_S)
                continue
            stages = stages or self._pick(self._suspects.not_draining(self._free(lane)))
            if stages is None:
                await self.changed.wait()
                continue
            lane.stages = stages
            opened = False
            began_s = time.monotonic()
            pipeline = Pipeline(
                stages, owner_id=self._owner_id, lease_s=self._settings.lease_s,
                stall_timeout_s=self._settings.stall_timeout_s, access=self._settings.stage_access,
            )  # fmt: skip
            self.open_pipelines.add(pipeline)
            try:
                await lane.open(pipeline, self._on_draining)
                opened = True
                await prove(lane, pipeline, self._make_choice, timeout_s=self._settings.canary_timeout_s)
                self._times = self._times.after(opening_s=time.monotonic() - began_s)
                if proven and missed and not drained:
                    self._times = self._times.after(**{"binding_s" if bound else "replacing_s": began_s - lost_s})
                lane.num_recoveries += proven
                lane.state, proven = "ready", True
                cut = tuple(stage.layers for stage in stages)
                self.notify()
                logger.info("pipeline %s is ready in epoch %d", lane.name, pipeline.epoch, extra=_where(lane, pipeline))
                await self._until_over(lane, pipeline)
            except StagelineError as error:
                # Claimed: another gateway was first, which is no trouble.
                level = logging.INFO if error.reason == "STAGE_CLAIMED" else logging.WARNING
                logger.log(
                    level, "pipeline %s: %s: %s", lane.name, error.reason, error.message, extra=_where(lane, pipeline)
                )
            except Exception:  # a bug of ours must not end the lane and everything in it
                logger.exception("pipeline %s: unexpected error", lane.name, extra=_where(lane, pipeline))
            finally:
                lane.detach()
                if opened:
                    await self._account(lane, pipeline)
                await pipeline.close()
                self.open_pipelines.discard(pipeline)
            restarts = restarts.after(opened=opened, progressed=opened and lane.num_tokens > 0)
            if restarts.exhausted:
                lane.fail_all(
                    UnavailableError(
                        "PIPELINE_UNSTABLE",
                        f"the pipeline broke {restarts.num_fruitless} times without a token in between; retry elsewhere",
                        restarts=restarts.num_fruitless,
                    )
                )
            if opened:
                lost_s, missed, bound = time.monotonic(), False, False
                drained = any(self._suspects.stops_at_s(stage.incarnation) is not None for stage in stages)
            await self._suspects.note(stages)
            if self.all_taken():
                for each in self.lanes:
                    each.fail_all(pipelines_taken())
            lane.stages = ()
            self.notify()
            # A change of membership ends the wait, unless pipelines that were opened broke at once.
            # Gateways that refuse each other must not do so in step.
            delay_s = restarts.delay_s * random.uniform(0.5, 1.0)
            if restarts.num_fruitless > 1:
                await asyncio.sleep(delay_s)
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._membership.wait(), delay_s)

    async def _account(self, lane: Lane, pipeline: Pipeline) -> None:
        """Find out which stages died, of which steps."""
        if pipeline.cause is None:  # we gave it up ourselves
            return
        progress = await pipeline.progress(ASK_TIMEOUT_S)
        stalled = pipeline.cause.metadata.get("incarnation") if pipeline.cause.reason == "STAGE_STALLED" else None
        if stalled is not None:  # it answers calls, but as far as its work goes it is dead
            progress = [
                None if stage.incarnation == stalled else answer
                for stage, answer in zip(pipeline.stages, progress, strict=True)
            ]
        if None in progress:
            lane.on_deaths([None if stage is None else StageProgress(*stage) for stage in progress])

    async def _until_over(self, lane: Lane, pipeline: Pipeline) -> None:
        """Raises the cause when the pipeline breaks or a canary does not come back, STAGE_DRAINING when a stage drains and
        the pipeline is to end for it."""
        settings = self._settings
        broken = asyncio.create_task(pipeline.broken.wait())
        proving = asyncio.create_task(
            keep_proving(
                lane,
                pipeline,
                self._make_choice,
                interval_s=settings.canary_interval_s,
                timeout_s=settings.canary_timeout_s,
            )
        )
        try:
            waited_until_s: float | None = None
            while pipeline.cause is None:
                ends = [
                    end
                    for stage in pipeline.stages
                    if (end := self._suspects.stops_at_s(stage.incarnation)) is not None
                ]
                if ends:
                    waited_until_s = self._drain(lane, min(ends), waited_until_s)
                changed = asyncio.create_task(self.changed.wait())
                try:
                    await asyncio.wait(
                        {broken, changed, proving},
                        return_when=asyncio.FIRST_COMPLETED,
                        timeout=DRAIN_PERIOD_S if ends else None,
                    )
                finally:
                    changed.cancel()
                if proving.done():
                    proving.result()
            raise pipeline.cause
        finally:
            broken.cancel()
            proving.cancel()
            await asyncio.gather(proving, return_exceptions=True)

    def _drain(self, lane: Lane, end_s: float, waited_until_s: float | None) -> float | None:
        """Do what `choose` says of a lane one of whose stages stops at `end_s`. Raises STAGE_DRAINING when the pipeline is to
        end now; returns until when other replicas wait to take over, once there are any."""
        now_s = time.monotonic()
        lane.draining = True
        sequences, here = lane.remainders(), lane.pace()
        standing = [other for other in self.lanes if other is not lane and other.moving and not other.draining]
        replaced = self._pick(self._suspects.trusted(self._free(lane))) is not None
        if replaced and waited_until_s is None:
            wait_s = reopen_wait_s((one for _, one in sequences), remaining_s=end_s - now_s, here=here)
            waited_until_s = now_s + wait_s
        mended = self._mended_by(lane)
        action = choose(
            Situation(
                remaining_s=end_s - now_s,
                num_sequences=len(sequences),
                replaced=replaced,
                others_ready=bool(standing),
                mends_another=mended is not None,
                wait_s=0.0 if waited_until_s is None or not sequences else waited_until_s - now_s,
            )
        )
        if action in (Action.MOVE, Action.MERGE):
            targets = standing if action is Action.MOVE or mended is None else [mended]
            for choice, sequence in sequences:
                target = min(targets, key=lambda other: other.load)
                if action is Action.MERGE or not stays(
                    sequence, remaining_s=end_s - now_s, here=here, there=target.pace()
                ):
                    lane.take(choice)
                    target.adopt(choice)
            lane.pump()
            if lane.remainders():
                return waited_until_s
        if action is not Action.GO_ON:
            raise UnavailableError("STAGE_DRAINING", f"a stage is about to stop: {action.value}")
        return waited_until_s

    def _mended_by(self, lane: Lane) -> Lane | None:
        """Another draining lane that has a whole chain once this one gives its stages up. Of two that could mend each other,
        the older one is mended."""
        for other in self.lanes:
            if other is lane:
                return None
            if other.moving and other.draining:
                ours = self._suspects.not_draining(lane.stages)
                if self._pick([*self._suspects.trusted(self._free(other)), *ours]) is not None:
                    return other
        return None

    def _standing_beside(self, lane: Lane) -> list[Lane]:
        """Other pipelines that serve; those that drain only where there is no other."""
        moving = [other for other in self.lanes if other is not lane and other.moving]
        return [other for other in moving if not other.draining] or moving

    def _move(self, lane: Lane, others: list[Lane], ready_in_s: float | None) -> None:
        """Give the sequences of a lost pipeline away that go on sooner elsewhere."""
        sequences = lane.remainders()
        found = places(
            [one for _, one in sequences],
            ready_in_s=ready_in_s,
            here=lane.pace(),
            others=[other.standing() for other in others],
        )
        for (choice, _), place in zip(sequences, found, strict=True):
            if place is not None:
                lane.take(choice)
                others[place].adopt(choice)
        if num_moved := len(found) - found.count(None):
            logger.info(
                "pipeline %s: %d of %d sequences go on elsewhere", lane.name, num_moved, len(found),
                extra={"pipeline": lane.name},
            )  # fmt: skip

    def _end(self, lane: Lane) -> None:
        """Give up a lane that has no replicas and nothing to do."""
        self.lanes.remove(lane)
        # A suspect that recovers changes no membership, so look again when suspicion has passed.
        asyncio.get_running_loop().call_later(SUSPECT_S * random.uniform(0.8, 1.2), self._on_membership)

    def _bind_spares(self, lane: Lane, cut: tuple[LayerRange, ...]) -> None:
        """Have spares load what a lane lost that had a pipeline of `cut`. What other gateways have is not lost."""
        for binding in choose_bindings(
            cut,
            self._suspects.not_lost(self._free(lane)),
            fingerprint=self._fingerprint,
            owner_id=self._owner_id,
            loading=self._binder.loading(lane.name),
            passed_over=self._binder.passed_over(),
        ):
            self._binder.bind(binding, lane.name)

    def _on_draining(self, incarnation: str, remaining_s: float) -> None:
        self._suspects.drains(incarnation, remaining_s)
        logger.info("a stage drains, %.0f s are left", remaining_s)
        self.notify()

    def _pick(self, candidates: list[ReplicaRecord]) -> Chain | None:
        chains, _ = chain(candidates, self._fingerprint)
        return chains[0] if chains else None

    def _free(self, lane: Lane | None) -> list[ReplicaRecord]:
        """Replicas that no lane uses, or only this one."""
        used = {stage.incarnation for other in self.lanes if other is not lane for stage in other.stages}
        return [record for record in self._registry.replicas() if record.incarnation not in used]


def _where(lane: Lane, pipeline: Pipeline) -> dict[str, object]:
    """For structured log lines."""
    return {"pipeline": lane.name, "epoch": pipeline.epoch}
