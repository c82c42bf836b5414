"""A pipeline with a clock: how long steps take is a formula, so that latency can be tested without measuring time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.scheduler import MicroBatch, Scheduler, Sequence, StepTiming


@dataclass(kw_only=True)
class ClockedPipeline:
    """Stages one after another; each takes a step when it has it and is idle. Times in seconds of simulated time.

    A step takes every stage fixed_s + token_s · tokens + pair_s · tokens · context; `overhead_s` passes outside the stages
    (hops and gateway). Between events the scheduler is asked until it has nothing.
    """

    scheduler: Scheduler
    num_stages: int
    fixed_s: float
    token_s: float
    pair_s: float = 0.0
    overhead_s: float = 0.0
    now_s: float = 0.0
    busy_s: float = 0.0  # of the last stage
    token_times: dict[int, list[float]] = field(default_factory=dict)  # sequence → when each of its tokens came
    _free_at: list[float] = field(default_factory=list)
    _flying: deque[tuple[MicroBatch, float, float]] = field(default_factory=deque)

    def add(self, sequence_id: int, num_prompt: int, num_output: int, *, common: int = 0, **fields) -> Sequence:
        """Queue a prompt whose first `common` tokens are those of every other."""
        prompt = tuple(at if at < common else 10_000 * (10 + sequence_id) + at for at in range(num_prompt))
        sequence = Sequence(
            sequence_id=sequence_id, prompt_token_ids=prompt, max_total_tokens=num_prompt + num_output, **fields
        )
        self.scheduler.add(sequence)
        self.token_times[sequence_id] = []
        return sequence

    def run(self, until: Callable[[], bool]) -> None:
        """Go on until a condition holds or nothing is left to do."""
        self._free_at = self._free_at or [0.0] * self.num_stages
        while not until():
            self.scheduler.expire(self.now_s)
            while (step := self.scheduler.schedule()) is not None:
                self._send(step)
            if not self._flying:
                return
            step, returns_s, stage_s = self._flying.popleft()
            self.now_s = max(self.now_s, returns_s)
            tokens = {row.sequence.sequence_id: 1 for row in step.rows if row.wants_output}
            for sequence_id in tokens:
                self.token_times[sequence_id].append(self.now_s)
            self.scheduler.complete(step.step_id, tokens, timing=StepTiming(stage_s, self.overhead_s))

    def _send(self, step: MicroBatch) -> None:
        pairs = sum(row.num_tokens * (row.start + row.num_tokens / 2) for row in step.rows)
        stage_s = self.fixed_s + self.token_s * step.num_tokens + self.pair_s * pairs
        at_s = self.now_s + self.overhead_s
        for stage in range(self.num_stages):
            at_s = max(at_s, self._free_at[stage]) + stage_s
            self._free_at[stage] = at_s
        self.busy_s += stage_s
        self._flying.append((step, at_s, stage_s))
