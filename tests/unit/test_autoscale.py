"""Autoscaling: how many pipelines a demand wants, and the policy as Ray Serve wraps and calls it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.autoscale.policy import Demand, LockstepPolicy, Targets, latest, pipelines_wanted

TARGETS = Targets(sequences=10, queued_tokens=1000, kv_fraction=0.8, batch_backlog_tokens=5000)
NUMBERS = st.integers(0, 10_000)
BOUNDS = {"capacity_adjusted_min_replicas": 0, "capacity_adjusted_max_replicas": 9}


@pytest.mark.parametrize(
    ("demand", "wanted"),
    [
        ({}, 0),
        ({"sequences": 1}, 1),
        ({"sequences": 10}, 1),
        ({"sequences": 11}, 2),
        ({"queued_tokens": 2001}, 3),
        ({"kv_pipelines": 0.81}, 2),
        ({"batch_backlog_tokens": 5001}, 2),
        ({"pipelines": 3, "sequences": 1}, 1),
        ({"pipelines": 3, "sequences": 1, "late_sequences": 1}, 4),
    ],
)
def test_wanted(demand: dict[str, float], wanted: int) -> None:
    assert pipelines_wanted([Demand(**demand)], TARGETS) == wanted


@given(sequences=NUMBERS, queued=NUMBERS, more=NUMBERS, split=st.integers(0, 100))
def test_more_demand_never_wants_less_and_gateways_add_up(sequences: int, queued: int, more: int, split: int) -> None:
    base = pipelines_wanted([Demand(sequences=sequences, queued_tokens=queued)], TARGETS)
    assert pipelines_wanted([Demand(sequences=sequences + more, queued_tokens=queued)], TARGETS) >= base
    assert pipelines_wanted([Demand(sequences=sequences, queued_tokens=queued, late_sequences=1)], TARGETS) >= base
    one = sequences * split // 100
    both = [Demand(sequences=one), Demand(sequences=sequences - one, queued_tokens=queued)]
    assert pipelines_wanted(both, TARGETS) == base


def key(name: str) -> SimpleNamespace:
    return _Key(name=name)


class _Key(SimpleNamespace):
    __hash__ = object.__hash__


def series(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(timestamp=100.0 + at, value=value) for at, value in enumerate(values)]


def metrics(**demand: float) -> dict[str, dict[str, list[SimpleNamespace]]]:
    return {name: {"g": series(999.0, value)} for name, value in Demand(**demand).stats().items()}


def test_all_stages_move_together_and_the_newest_number_counts() -> None:
    gateway, stages = key("gateway"), [key("stage-0"), key("stage-1"), key("stage-2")]
    contexts = {gateway: SimpleNamespace(raw_metrics=metrics(sequences=25), target_num_replicas=1)}
    contexts |= {
        stage: SimpleNamespace(raw_metrics={}, target_num_replicas=at + 1, **BOUNDS) for at, stage in enumerate(stages)
    }
    policy = LockstepPolicy(sequences=10)
    assert policy(contexts) == (dict.fromkeys(stages, 3), {})
    contexts[gateway].raw_metrics = metrics()
    assert policy(contexts) == (dict.fromkeys(stages, 0), {})
    contexts[gateway].raw_metrics.popitem()  # a part is missing: that is not zero
    assert policy(contexts) == (dict.fromkeys(stages, 3), {})
    contexts[gateway].raw_metrics = metrics(sequences=1)
    assert LockstepPolicy(gateways=2)(contexts)[0] == dict.fromkeys(stages, 3)  # the other gateway said nothing


def test_reports_of_two_gateways() -> None:
    raw = metrics(sequences=3)
    for name, replicas in raw.items():
        replicas["h"] = series(7.0 if name == "stageline_sequences" else 0.0)
    assert sorted(demand.sequences for demand in latest(raw)) == [3, 7]
    assert latest({}) == []


@pytest.mark.parametrize("name", ["sequences", "queued_tokens", "kv_fraction", "batch_backlog_tokens"])
def test_targets_are_over_zero(name: str) -> None:
    with pytest.raises(ValueError, match="over 0"):
        LockstepPolicy(**{name: 0})


def test_ray_serve_takes_the_policy() -> None:
    """The wrapper that Serve puts around an application-level policy: bounds and delays of each deployment's own config."""
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.common import DeploymentID
    from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

    config = AutoscalingConfig(min_replicas=1, max_replicas=2, upscale_delay_s=0, downscale_delay_s=0)

    def context(name: str, raw: dict) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=DeploymentID(name=name, app_name="a"), deployment_name=name, app_name="a",
            current_num_replicas=1, target_num_replicas=1, running_replicas=[], total_num_requests=0,
            total_queued_requests=0, aggregated_metrics={}, raw_metrics=raw, capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=2, policy_state={}, last_scale_up_time=None, last_scale_down_time=None,
            current_time=1e9, config=config,
        )  # fmt: skip

    declared = AutoscalingPolicy(
        policy_function="gateway.autoscale.policy:LockstepPolicy", policy_kwargs={"sequences": 10}
    )
    declared.serialize_policy()
    wrapped = _apply_app_level_autoscaling_config(_resolve_policy_callable(declared))
    for sequences, replicas in ((0, 1), (15, 2), (95, 2)):
        contexts = [context("gateway", metrics(sequences=sequences)), context("stage-0", {}), context("stage-1", {})]
        decisions, _ = wrapped({one.deployment_id: one for one in contexts})
        assert {at.name: count for at, count in decisions.items()} == {"stage-0": replicas, "stage-1": replicas}


def test_the_scheduler_tells_what_is_used_and_what_comes_too_late() -> None:
    from gateway.scheduler import Scheduler, SchedulerLimits, Sequence

    scheduler = Scheduler(num_blocks=10, block_size_tokens=4, limits=SchedulerLimits(prefix_caching=False))
    assert (scheduler.kv_used_fraction, scheduler.num_late(0.0)) == (0, 0)
    for number, deadline_s in enumerate((None, 0.5, 100.0)):
        scheduler.add(
            Sequence(sequence_id=number, prompt_token_ids=(1,) * 20, max_total_tokens=24, deadline_s=deadline_s)
        )
    assert scheduler.num_late(0.0) == 1  # a rate that is not known counts as a second
    assert scheduler.num_late(99.5) == 2
    assert scheduler.schedule() is not None
    assert scheduler.kv_used_fraction == 0.5
    assert [one.sequence_id for one in scheduler.live_sequences] == [0, 1, 2]
