"""The simulator: virtual time against sums made by hand, conservation of requests, recovery, the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.cli import main
from gateway.planner.catalogue import Host, find_model_config, gpus, parse_inventory
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.cost import Link
from gateway.planner.types import Request
from gateway.simulator import Failures, GatewayCost, Scenario, Traffic, simulate
from gateway.simulator.clock import Clock, Cores, Worker, steady
from gateway.simulator.recovery import recoveries
from gateway.simulator.traffic import arrivals, rate_at

FREE_GATEWAY = GatewayCost(request_s=0, step_s=0, row_s=0)


def scenario(
    inventory: str = "a100-80g:4", num_stages: int | None = None, host: Host | None = None, **changes
) -> Scenario:
    request = Request(
        model="qwen2-72b",
        config=find_model_config("qwen2-72b"),
        gpus=tuple(replace(gpu, host=host) for gpu in parse_inventory(inventory, gpus())),
        num_stages=num_stages,
        link=changes.pop("link", Link()),
    )
    return replace(Scenario(request=request, plan=make_cluster_plan(request)), **changes)


def closed(streams: int, prompt: int, output: int) -> Traffic:
    return Traffic(streams=streams, prompt_tokens=prompt, output_tokens=output, sigma=0)


@given(
    jobs=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 5)), min_size=1, max_size=30),
    cores=st.sampled_from([None, 1, 2, 3]),
)
@settings(deadline=None)
def test_workers_do_one_thing_at_a_time_on_so_many_cores(jobs, cores) -> None:
    clock = Clock()
    pool = Cores(clock, None if cores is None else Host(cores=cores))
    workers = [Worker(clock, pool) for _ in range(4)]
    ended: list[tuple[int, int, float]] = []
    for number, (worker, job_s) in enumerate(jobs):
        workers[worker].submit(steady(job_s), lambda _, n=number, w=worker: ended.append((w, n, clock.now_s)))
    clock.run(1e6)
    assert len(ended) == len(jobs)
    for worker in range(4):  # each in its own order
        assert [n for w, n, _ in ended if w == worker] == [n for n, (w, _) in enumerate(jobs) if w == worker]
    total = sum(job_s for _, job_s in jobs)
    longest = max(sum(job_s for w, job_s in jobs if w == worker) for worker in range(4))
    makespan = max(at for *_, at in ended)
    assert makespan <= total + 1e-6
    assert makespan >= max(longest, total / (cores or 4)) - 1e-9
    if cores is None:
        assert makespan == pytest.approx(longest)
    if cores == 1:
        assert makespan == pytest.approx(total)
    assert sum(worker.busy_s for worker in workers) == pytest.approx(total)


def test_jobs_share_cores_evenly_and_slow_each_other_down() -> None:
    """Three jobs on two cores: by hand. A job takes twice as long while both cores compute."""
    clock = Clock()
    cores, ended = Cores(clock, Host(cores=2)), []

    def run(name: str, alone_s: float, busy_s: float) -> None:
        cores.run(
            (alone_s, busy_s, busy_s), lambda spent: ended.append((name, clock.now_s, spent.elapsed_s, spent.core_s))
        )

    run("a", 1.0, 2.0)
    run("b", 4.0, 8.0)
    clock.after(1.0, lambda: run("c", 1.0, 1.0))
    clock.run(100.0)
    # a and b have a core each for 1 s: a is half done, b an eighth. Then each of three has 2/3 of a core: a ends its other
    # half of 2 s of core time after 1.5 s, and c, of 1 s, as well. b has had 2 s of 8, and does 3/4 of 4 s alone.
    assert ended == [
        ("a", pytest.approx(2.5), pytest.approx(2.5), pytest.approx(2.0)),
        ("c", pytest.approx(2.5), pytest.approx(1.5), pytest.approx(1.0)),
        ("b", pytest.approx(5.5), pytest.approx(5.5), pytest.approx(5.0)),
    ]


def test_a_crowd_empties_caches_and_a_background_takes_its_part() -> None:
    """Four jobs on two cores, of which the rest of the system takes a half: by hand."""
    clock = Clock()
    cores, ended = Cores(clock, Host(cores=2, background_cores=0.5)), []
    for _ in range(4):
        cores.run((1.0, 2.0, 3.0), lambda spent: ended.append((clock.now_s, spent.core_s)))
    clock.run(100.0)
    # Each has 3/8 of a core and takes 3 s on it.
    assert ended == [(pytest.approx(8.0), pytest.approx(3.0))] * 4


def test_hops_take_time_of_the_cores_that_stages_share() -> None:
    many = closed(32, 256, 64)
    free, dear = (
        simulate(
            scenario(traffic=many, host=Host(cores=1, hop_core_s=hop_s), gateway_cost=FREE_GATEWAY, duration_s=60.0, warmup_s=20.0)
        )
        for hop_s in (0.0, 0.02)
    )  # fmt: skip
    computing_s = 1 / (
        free.output_tokens_per_s / free.rows_per_step
    )  # of a step and its part of the prompts, on all stages
    assert dear.output_tokens_per_s / dear.rows_per_step == pytest.approx(1 / (computing_s + 4 * 0.02), rel=0.15)


def test_one_stream_is_as_fast_as_the_plan_says() -> None:
    one = scenario(traffic=closed(1, 2000, 200), gateway_cost=FREE_GATEWAY)
    result = simulate(one)
    # Positions from 2000 to 2200 against 2048 in the plan.
    assert result.itl_s["p50"] == pytest.approx(one.plan.performance.latency_s_per_token, rel=0.01)
    slow = simulate(replace(one, gateway_cost=replace(FREE_GATEWAY, step_s=0.01)))
    assert slow.itl_s["p50"] == pytest.approx(result.itl_s["p50"] + 0.01, abs=1e-4)
    assert sum(result.utilization) < 1.05  # one token is in one stage at a time; chunks of a prompt overlap


def test_a_full_pipeline_is_as_fast_as_the_plan_says() -> None:
    one = scenario(gateway_cost=FREE_GATEWAY)
    performance = one.plan.performance
    result = simulate(
        replace(one, traffic=closed(performance.sequences // 2, 1700, 700), duration_s=80.0, warmup_s=50.0)
    )
    rows = result.rows_per_step
    assert rows == pytest.approx(performance.sequences / 2 / 4, rel=0.25)
    assert 0.7 < max(result.utilization) <= 1
    per_s = result.output_tokens_per_s + result.prompt_tokens_per_s / 20  # a prompt token costs about a twentieth
    assert 0.3 * performance.tokens_per_s < per_s < 1.05 * performance.tokens_per_s


def test_stages_of_one_host_share_its_cores() -> None:
    many = closed(32, 256, 64)
    apart, together = (
        simulate(scenario(traffic=many, host=host, duration_s=60.0, warmup_s=20.0)) for host in (None, Host(cores=1))
    )
    assert together.output_tokens_per_s < 0.4 * apart.output_tokens_per_s
    assert sum(together.utilization) + together.gateway_utilization < 1.02  # steps count when they return


def test_a_slow_gateway_is_the_bottleneck_and_a_second_one_helps() -> None:
    slow = GatewayCost(request_s=0, step_s=0.02, row_s=0.001)
    base = scenario(
        "a100-80g:16", 4, pipelines=4, traffic=closed(64, 256, 128), gateway_cost=slow, duration_s=40.0, warmup_s=10.0
    )
    one, two = simulate(base), simulate(replace(base, gateways=2))
    assert one.gateway_utilization > 0.97
    assert two.output_tokens_per_s > 1.6 * one.output_tokens_per_s


def test_links_delay_prefill() -> None:
    lone = closed(1, 8000, 2)
    ttft = {
        gbps: simulate(
            scenario(
                traffic=lone,
                duration_s=30.0,
                warmup_s=0.0,
                link=Link(bytes_per_s=gbps * 1e9 / 8, software_bytes_per_s=1e12),
            )
        ).ttft_s["p50"]
        for gbps in (1, 10, 100)
    }
    assert ttft[1] > 1.3 * ttft[10] > 1.3 * ttft[100]


def test_arrivals_follow_the_day() -> None:
    traffic = Traffic(requests_per_s=5, daily_swing=0.8, day_s=1000)
    times = [arrival.at_s for arrival in arrivals(traffic, 4000, seed=3)]
    assert len(times) == pytest.approx(5 * 4000, rel=0.03)
    for begin in (0, 250, 500, 750):  # a window of 100 s in each of four days
        got = sum((at - begin) % 1000 < 100 for at in times) / 400
        assert got == pytest.approx(rate_at(traffic, begin + 50), rel=0.2)
    assert times == [arrival.at_s for arrival in arrivals(traffic, 4000, seed=3)]
    assert not list(arrivals(replace(traffic, requests_per_s=0), 4000, seed=3))


@pytest.mark.parametrize("failures", [Failures(), Failures(mtbf_s=60, restart_s=10), Failures(mtbf_s=60, spares=1)])
@pytest.mark.parametrize(("pipelines", "gateways"), [(1, 1), (2, 1), (3, 2)])
def test_no_request_is_lost(failures: Failures, pipelines: int, gateways: int) -> None:
    busy = scenario(
        "a100-80g:16", 4, pipelines=pipelines, gateways=gateways, failures=failures,
        traffic=Traffic(requests_per_s=2 * pipelines), warmup_s=0.0, duration_s=40.0,
    )  # fmt: skip
    result = simulate(busy)
    assert result.requests == result.completed + result.refused + result.unfinished
    assert result.requests == len(list(arrivals(busy.traffic, 40.0, busy.seed)))
    assert result.refused == 0
    assert (result.deaths > 0) == (failures.mtbf_s is not None)
    assert (result.availability < 1) == (result.deaths > 0)
    assert simulate(busy) == result


def test_pauses_after_a_death() -> None:
    at = {"traffic": closed(6, 1000, 400), "duration_s": 90.0, "warmup_s": 0.0}
    down = Failures(at_s=(50.0,), restart_s=30.0, detection_s=0.1, takeover_s=0.4)
    alone = simulate(scenario(failures=down, **at))
    assert alone.deaths == 1
    assert alone.moved_sequences == 0
    least = alone.recovery_pauses_s
    assert 30.5 < min(least.values()) <= max(least.values()) < 34  # and 8 prompts of up to 1,400 tokens, again
    spare = simulate(scenario(failures=replace(down, spares=1), **at)).recovery_pauses_s
    assert 0.5 < min(spare.values()) <= max(spare.values()) < 4
    two = simulate(scenario("a100-80g:8", 4, pipelines=2, failures=down, **at))
    assert two.moved_sequences > 0
    assert max(two.recovery_pauses_s.values()) < 4


def test_recovery_of_one_long_sequence_by_hand() -> None:
    one = scenario(gateway_cost=FREE_GATEWAY)
    ways = {way.strategy: way for way in recoveries(one, [32768], lost_stage=1)}
    first_s = one.failures.detection_s + one.failures.takeover_s
    link = one.request.link
    assert ways["mirror"].pauses_s[0] == pytest.approx(
        first_s + one.plan.performance.latency_s_per_token + link.seconds(32768 * 21 * 2 * 8 * 128 * 2)
    )
    # n chunks leave four stages after n + 3 steps, and one stage after n.
    recompute_s, journal_s = (ways[name].pauses_s[0] - first_s for name in ("recompute", "journal"))
    assert 1.0 < recompute_s / journal_s < 1 + 8 / 16
    assert ways["journal"].kept_bytes_per_token == 8192 * 2
    assert ways["mirror"].sent_bytes_per_token == 21 * 2 * 8 * 128 * 2


def test_more_live_tokens_take_longer_and_none_is_forgotten() -> None:
    one = scenario()
    previous = 0.0
    for count in (1, 8, 40):
        for way in recoveries(one, [2048] * count, lost_stage=2):
            assert len(way.pauses_s) == count
            assert list(way.pauses_s) == sorted(way.pauses_s)
        worst = max(max(way.pauses_s) for way in recoveries(one, [2048] * count, lost_stage=2))
        assert worst > previous
        previous = worst


def test_command(capsys) -> None:
    flags = ["simulate", "--model", "qwen2-72b", "--gpu", "a100-80g:8", "--stages", "4", "--duration-s", "30"]
    assert main([*flags, "--live-tokens", "5000", "--output", "json", "--requests-per-s", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["num_pipelines"] == 2
    assert found["requests"] > 20
    assert set(found["recovery_s"]) == {"recompute", "journal", "mirror"}
    assert main([*flags, "--mtbf-days", "0.001", "--restart-s", "5"]) == 0
    assert "deaths" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--gpu", "l4-24g:2"], "PLAN_DOES_NOT_FIT"),
        ([], "GPU_MISSING"),
        (["--gpu", "a100-80g:4", "--gateways", "2"], "GATEWAYS_IDLE"),
        (["--gpu", "a100-80g:4", "--live-tokens", "1000000"], "KV_CACHE_TOO_SMALL"),
        (["--gpu", "a100-80g:4", "--prompt-tokens", "100000"], "KV_CACHE_TOO_SMALL"),
        (["--gpu", "a100-80g:4", "--warmup-s", "200"], "CONFIG_INVALID"),
        (["--gpu", "a100-80g:4", "--daily-swing", "1.5"], "CONFIG_INVALID"),
        (["--gpu", "a100-80g:4", "--requests-per-s", "-1"], "CONFIG_INVALID"),
    ],
)
def test_wrong_flags(flags: list[str], reason: str, capsys) -> None:
    assert main(["simulate", "--model", "qwen2-72b", *flags]) == 2
    assert reason in capsys.readouterr().err
