"""How long a lost stage keeps its sequences waiting, by what is done about the KV cache it held.

- `recompute`: every sequence is prefilled again through all stages, by the real scheduler. What the gateway does.
- `journal`: the inputs of the lost stage were kept beside it; only that stage computes, one sequence after another.
- `mirror`: its keys and values were copied to another host as they came; they are read back over the network.

Journal and mirror resume the shortest first. They are lower bounds: what is not in flight exactly when the stage dies, and
keeping copies consistent with freed and reused blocks, costs nothing here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

from gateway.planner.cost import Step, stage_seconds
from gateway.planner.report import DTYPE_BYTES
from gateway.scheduler import Sequence
from gateway.simulator.clock import Clock, Worker
from gateway.simulator.lane import SimulatedLane, cores_of
from gateway.simulator.scenario import Scenario
from stages.partition import parse_layer_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Seconds from a death to the next token, for every sequence, ascending; and what the way there costs all the time."""

    strategy: str
    pauses_s: tuple[float, ...]
    kept_bytes_per_token: int
    """Host memory for each live token, beside the KV cache, for each stage."""
    sent_bytes_per_token: int
    """Sent to another host for each computed token, for each stage."""


def recoveries(scenario: Scenario, live_tokens: Sequence_[int], *, lost_stage: int) -> tuple[Recovery, ...]:
    """All three ways, for sequences of `live_tokens` tokens each that were decoding when a stage died.

    `live_tokens` together fit the KV cache of the scenario's plan.
    """
    plan, config = scenario.plan, scenario.request.config
    size = DTYPE_BYTES[plan.dtype]
    stage = plan.stages[lost_stage]
    hidden = config.hidden_size * size
    return (
        Recovery(
            strategy="recompute",
            pauses_s=_recompute(scenario, live_tokens),
            kept_bytes_per_token=0,
            sent_bytes_per_token=0,
        ),
        # The stage before keeps what it sends: nothing goes over the network for it.
        Recovery(
            strategy="journal",
            pauses_s=_one_by_one(scenario, live_tokens, [_replay_s(scenario, n, lost_stage) for n in live_tokens]),
            kept_bytes_per_token=hidden,
            sent_bytes_per_token=0,
        ),
        Recovery(
            strategy="mirror",
            pauses_s=_one_by_one(
                scenario,
                live_tokens,
                [scenario.request.link.seconds(n * stage.kv_bytes_per_token) for n in live_tokens],
            ),
            kept_bytes_per_token=stage.kv_bytes_per_token,
            sent_bytes_per_token=stage.kv_bytes_per_token,
        ),
    )


def _first_s(scenario: Scenario) -> float:
    return scenario.failures.detection_s + scenario.failures.takeover_s


def _recompute(scenario: Scenario, live_tokens: Sequence_[int]) -> tuple[float, ...]:
    clock = Clock()
    cores = cores_of(scenario, clock)
    pauses: list[float] = []
    waiting = set(range(len(live_tokens)))

    def on_tokens(sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.sequence_id in waiting:
                waiting.remove(sequence.sequence_id)
                pauses.append(_first_s(scenario) + clock.now_s)

    lane = SimulatedLane(scenario, clock, cores, Worker(clock, cores), on_tokens)
    for number, length in enumerate(live_tokens):
        lane.scheduler.add(
            Sequence(
                sequence_id=number,
                prompt_token_ids=(0,) * max(1, length - 1),
                output_token_ids=[1] * min(1, length - 1),
                max_total_tokens=length + 64,  # goes on decoding beside those that are still computed
                resumed=True,
                use_prefix_cache=False,
            ),
            bounded=False,
        )
    lane.pump()
    while waiting:
        clock.run(clock.now_s + 1.0)
    return tuple(sorted(pauses))


def _one_by_one(scenario: Scenario, live_tokens: Sequence_[int], restore_s: Sequence_[float]) -> tuple[float, ...]:
    performance = scenario.plan.performance
    assert performance is not None
    in_order = [seconds for _, seconds in sorted(zip(live_tokens, restore_s, strict=True))]
    step_s = _first_s(scenario) + performance.latency_s_per_token
    return tuple(step_s + done_s for done_s in itertools.accumulate(in_order))


def _replay_s(scenario: Scenario, num_tokens: int, lost_stage: int) -> float:
    """One sequence through the lost stage alone: its chunks come over the link while the ones before are computed."""
    request, plan = scenario.request, scenario.plan
    size = DTYPE_BYTES[plan.dtype]
    layers = parse_layer_ranges(plan.layers())[lost_stage]
    gpus = {gpu.name: gpu for gpu in request.gpus}
    total_s = 0.0
    for start in range(0, num_tokens, scenario.limits.max_step_tokens):
        chunk = min(scenario.limits.max_step_tokens, num_tokens - start)
        step = Step(
            tokens=chunk, output_rows=0, attended_tokens=chunk * (start + (chunk + 1) / 2), kv_tokens=start + chunk
        )
        compute_s = stage_seconds(request.config, layers, gpus[plan.stages[lost_stage].gpu], step, size)
        total_s += max(compute_s, request.link.seconds(chunk * request.config.hidden_size * size))
    return total_s
