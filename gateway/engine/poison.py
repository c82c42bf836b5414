"""Who is to blame when a stage dies, and how often a pipeline is opened again. Pure.

A sequence is suspected only of deaths of stages that may have been executing a step of it, counted by stage, since its last
token. Two deaths of one stage: it runs alone from then on. The third, alone, proves it: only it fails. A token clears it.
Innocent sequences that shared steps with a poisonous one are cleared by their next token, alone or not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway import scheduler

DEATHS_TO_RUN_ALONE, DEATHS_TO_FAIL = 2, 3
MIN_DELAY_S, MAX_DELAY_S = 0.1, 2.0
MAX_RESTARTS = 12


@dataclass(frozen=True, slots=True)
class StageProgress:
    """What a stage said when its pipeline broke: the step it executed last and the one it executes (0: none)."""

    executed_step: int
    running_step: int


def steps_in_doubt(progress: Sequence[StageProgress | None], sent_steps: Collection[int]) -> dict[int, list[int]]:
    """The steps that each dead stage may have been executing, by its place in the pipeline.

    `progress` has None for a stage that died; `sent_steps` were sent and have not returned. A stage executes in order, so
    it was past what any later stage has begun, and no further than what the stage before it has finished.
    """
    doubts = {}
    for place, stage in enumerate(progress):
        if stage is not None:
            continue
        later = [other for other in progress[place + 1 :] if other is not None]
        passed = max((max(other.executed_step, other.running_step) for other in later), default=0)
        before = [other for other in progress[:place] if other is not None]
        reached = min((other.executed_step for other in before), default=None)
        doubts[place] = sorted(
            step_id for step_id in sent_steps if step_id > passed and (reached is None or step_id <= reached)
        )
    return doubts


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a death. `alone` run alone from now on, `poisonous` fail."""

    alone: tuple[scheduler.Sequence, ...]
    poisonous: tuple[scheduler.Sequence, ...]


def judge(suspects_by_stage: Mapping[str, Collection[scheduler.Sequence]]) -> Verdict:
    """Count the death of each stage (by its layers) against the live sequences of the steps it may have been executing."""
    alone, poisonous = [], []
    for stage, suspects in suspects_by_stage.items():
        for sequence in suspects:
            count = sequence.deaths[stage] = sequence.deaths.get(stage, 0) + 1
            if sequence.run_alone and len(suspects) == 1 and count >= DEATHS_TO_FAIL:
                poisonous.append(sequence)
            elif count >= DEATHS_TO_RUN_ALONE:
                alone.append(sequence)
    return Verdict(tuple(alone), tuple(poisonous))


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a lane's attempts to have a pipeline went. `num_fruitless`: pipelines in a row that broke before any request got
    a token of them; attempts that never opened one do not count, since then there is nothing to blame."""

    num_fruitless: int = 0
    num_failed_attempts: int = 0

    def after(self, *, opened: bool, progressed: bool) -> Restarts:
        """One more attempt is over."""
        if progressed:
            return Restarts()
        if opened:
            return replace(self, num_fruitless=self.num_fruitless + 1, num_failed_attempts=0)
        return replace(self, num_failed_attempts=self.num_failed_attempts + 1)

    @property
    def delay_s(self) -> float:
        """Before the next attempt."""
        exponent = max(0, self.num_fruitless + self.num_failed_attempts - 1)
        return float(min(MAX_DELAY_S, MIN_DELAY_S * 2**exponent))

    @property
    def exhausted(self) -> bool:
        """Whether requests have waited for enough pipelines that broke."""
        return self.num_fruitless >= MAX_RESTARTS
