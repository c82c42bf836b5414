"""What running streams and long prompts wait for each other, on a pipeline with a simulated clock.

The costs are those of a 0.5B model on two CPU cores: a step reads weights for 33 ms and takes 1.65 ms a token, divided among
the stages; a prompt of 4,096 tokens takes 7 s.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from pipeline_clock import ClockedPipeline

from gateway.scheduler import Scheduler, SchedulerLimits


def make_pipeline(num_stages: int, *, overhead_s: float = 0.003, fixed_s: float = 0.033, **limits) -> ClockedPipeline:
    scheduler = Scheduler(
        num_blocks=2000,
        block_size_tokens=16,
        max_in_flight=num_stages + 1,
        num_stages=num_stages,
        limits=SchedulerLimits(**limits),
    )
    return ClockedPipeline(
        scheduler=scheduler,
        num_stages=num_stages,
        fixed_s=fixed_s / num_stages,
        token_s=0.00165 / num_stages,
        pair_s=1e-7 / num_stages,
        overhead_s=overhead_s,
    )


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def warm_up(pipeline: ClockedPipeline) -> None:
    """The scheduler learns what steps cost, as it does from the first requests of a gateway."""
    for sequence_id in range(-4, 0):
        pipeline.add(sequence_id, 128, 8)
    pipeline.run(lambda: False)


@pytest.mark.parametrize("num_streams", [1, 4, 16])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_long_prompt_and_running_streams_hardly_hold_each_other_up(num_stages: int, num_streams: int) -> None:
    alone = make_pipeline(num_stages)
    warm_up(alone)
    begun_s = alone.now_s
    alone.add(0, 4096, 2)
    alone.run(lambda: bool(alone.token_times[0]))
    alone_s = alone.now_s - begun_s

    pipeline = make_pipeline(num_stages)
    warm_up(pipeline)
    for sequence_id in range(1, num_streams + 1):
        pipeline.add(sequence_id, 128, 2000)
    pipeline.run(lambda: all(len(pipeline.token_times[i]) > 100 for i in range(1, num_streams + 1)))
    begun_s = pipeline.now_s
    before = [gap for i in range(1, num_streams + 1) for gap in gaps(pipeline.token_times[i][-50:])]
    pipeline.add(0, 4096, 2)
    pipeline.run(lambda: bool(pipeline.token_times[0]))
    first_token_s = pipeline.now_s - begun_s
    during = [
        gap
        for i in range(1, num_streams + 1)
        for gap in gaps([time_s for time_s in pipeline.token_times[i] if time_s >= begun_s])
    ]
    assert quantile(during, 0.99) <= 2.5 * quantile(before, 0.5)
    assert first_token_s <= 2 * alone_s


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_of_prompts_that_come_together_the_first_to_decode_does_not_pace_the_others(num_stages: int) -> None:
    last_first_token_s = {}
    for num_new_tokens in (1, 64):
        pipeline = make_pipeline(num_stages)
        warm_up(pipeline)
        begun_s = pipeline.now_s
        for sequence_id in range(16):
            pipeline.add(sequence_id, 128, num_new_tokens)
        pipeline.run(lambda pipeline=pipeline: all(pipeline.token_times[i] for i in range(16)))
        last_first_token_s[num_new_tokens] = pipeline.now_s - begun_s
    assert last_first_token_s[64] <= 1.35 * last_first_token_s[1]


def test_a_prompt_that_comes_to_streams_is_paced_though_others_come_with_it() -> None:
    pipeline = make_pipeline(1)
    warm_up(pipeline)
    pipeline.add(0, 128, 2000)
    pipeline.run(lambda: len(pipeline.token_times[0]) > 100)
    before = gaps(pipeline.token_times[0][-50:])
    for sequence_id in range(1, 9):
        pipeline.add(sequence_id, 512, 64)
    begun_s = pipeline.now_s
    pipeline.run(lambda: all(pipeline.token_times[i] for i in range(1, 9)))
    during = gaps([time_s for time_s in pipeline.token_times[0] if time_s >= begun_s])
    assert quantile(during, 0.99) <= 3 * quantile(before, 0.5), (
        "2.35 beside the stream alone; prompts that are done decode too"
    )


@pytest.mark.parametrize(
    ("num_stages", "overhead_s", "fixed_s", "num_groups"),
    [
        (1, 0.003, 0.033, 1),  # a second group would read the weights twice to save 3 ms
        (2, 0.003, 0.033, 2),
        (4, 0.020, 0.060, 5),  # a slow network: 15 ms of weights a stage against 20 ms of hops
        (4, 0.003, 0.033, 4),
    ],
)
def test_decodes_fly_in_as_many_groups_as_pay(
    num_stages: int, overhead_s: float, fixed_s: float, num_groups: int
) -> None:
    pipeline = make_pipeline(num_stages, overhead_s=overhead_s, fixed_s=fixed_s)
    warm_up(pipeline)
    for sequence_id in range(20):
        pipeline.add(sequence_id, 32, 300)
    pipeline.run(lambda: all(len(times) > 200 for name, times in pipeline.token_times.items() if name >= 0))
    sizes = [len(step.rows) for step, *_ in pipeline._flying]
    sizes.append(20 - sum(sizes))  # of the one that has just returned
    assert len(sizes) == num_groups
    assert max(sizes) - min(sizes) <= 1


def test_the_last_stage_is_hardly_ever_idle_in_steady_decode() -> None:
    pipeline = make_pipeline(4)
    warm_up(pipeline)
    for sequence_id in range(64):
        pipeline.add(sequence_id, 32, 600)
    pipeline.run(lambda: all(len(times) > 100 for name, times in pipeline.token_times.items() if name >= 0))
    begun_s, busy_s = pipeline.now_s, pipeline.busy_s
    pipeline.run(lambda: all(len(times) > 500 for name, times in pipeline.token_times.items() if name >= 0))
    # 4 micro-batches of 16 rows take the stages 64 ms to go round, and 3 ms pass outside them.
    assert pipeline.busy_s - busy_s >= 0.94 * (pipeline.now_s - begun_s)


def test_a_prompt_alone_is_cut_so_that_stages_work_at_the_same_time() -> None:
    times = {}
    for num_stages in (1, 4):
        pipeline = make_pipeline(num_stages)
        warm_up(pipeline)
        begun_s = pipeline.now_s
        pipeline.add(0, 4096, 1)
        pipeline.run(lambda: False)
        times[num_stages] = pipeline.now_s - begun_s
    assert times[4] <= 0.4 * times[1], "four stages of a quarter of the work each"


def test_prompts_with_a_common_beginning_that_come_together_compute_it_once() -> None:
    pipeline = make_pipeline(2)
    warm_up(pipeline)
    computed = []
    complete = pipeline.scheduler.complete

    def count(step_id, tokens, *, timing):
        computed.append(pipeline.scheduler._in_flight[0].num_tokens)
        complete(step_id, tokens, timing=timing)

    pipeline.scheduler.complete = count
    for sequence_id in range(16):
        pipeline.add(sequence_id, 1024 + 32, 1, common=1024)
    pipeline.run(lambda: False)
    assert sum(computed) == 1024 + 16 * 32


def test_a_second_request_with_the_same_beginning_answers_at_once() -> None:
    first_s, second_s = [], []
    for times, sequence_id in ((first_s, 0), (second_s, 1)):
        if sequence_id == 0:
            pipeline = make_pipeline(2)
            warm_up(pipeline)
        begun_s = pipeline.now_s
        pipeline.add(sequence_id, 1024 + 16, 1, common=1024)
        pipeline.run(lambda: False)
        times.append(pipeline.now_s - begun_s)
    assert second_s[0] <= 0.25 * first_s[0]


class Load:
    """Requests of one shape, `num_streams` at a time, for ever."""

    def __init__(
        self, pipeline: ClockedPipeline, num_streams: int, shape: tuple[int, int], first_id: int, priority: int
    ):
        self._pipeline, self._shape, self._priority = pipeline, shape, priority
        self._next_id, self._live = first_id, set[int]()
        self.done: list[int] = []
        for _ in range(num_streams):
            self._add()

    def _add(self) -> None:
        self._pipeline.add(self._next_id, *self._shape, priority=self._priority)
        self._live.add(self._next_id)
        self._next_id += 1

    def refill(self) -> None:
        for sequence_id in [one for one in self._live if len(self._pipeline.token_times[one]) == self._shape[1]]:
            self._live.remove(sequence_id)
            self.done.append(sequence_id)
            self._add()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_batch_beside_streams_hardly_slows_them_and_goes_on(num_stages: int) -> None:
    p99, lines = {}, {}
    for batch in (None, -100, 0):
        pipeline = make_pipeline(num_stages)
        warm_up(pipeline)
        loads = [Load(pipeline, 4, (64, 64), 0, 0)]
        if batch is not None:
            loads.append(Load(pipeline, 32, (32, 8), 100_000, batch))

        def late(loads=loads, pipeline=pipeline) -> bool:
            for load in loads:
                load.refill()
            return pipeline.now_s > 60

        pipeline.run(late)
        p99[batch] = quantile([gap for one in loads[0].done for gap in gaps(pipeline.token_times[one])], 0.99)
        lines[batch] = len(loads[-1].done)
    assert p99[-100] <= 1.5 * p99[None]
    assert p99[0] > 1.4 * p99[None], "as many equals do slow them: else nothing is shown here"
    assert lines[-100] >= 60, "a line a second"


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_batch_alone_is_as_fast_as_any_requests(num_stages: int) -> None:
    took_s = {}
    for priority in (0, -100):
        pipeline = make_pipeline(num_stages)
        warm_up(pipeline)
        for sequence_id in range(64):
            pipeline.add(sequence_id, 32, 8, priority=priority)
        pipeline.run(lambda: False)
        took_s[priority] = pipeline.now_s
    assert took_s[-100] == took_s[0]


def test_streams_that_wait_for_the_blocks_of_a_batch_do_not_slow_it() -> None:
    pipeline = make_pipeline(1)
    warm_up(pipeline)
    for sequence_id in range(60):  # all blocks
        pipeline.add(sequence_id, 480, 50, priority=-100)
    pipeline.run(lambda: all(pipeline.token_times[i] for i in range(50)))
    pipeline.add(1000, 4096, 2)
    begun_s = pipeline.now_s
    pipeline.run(lambda: bool(pipeline.token_times[1000]))
    assert pipeline.now_s - begun_s <= 30
