"""The planner: the split against brute force, every byte of a GPU, times against sums made by hand."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway.planner.advice import advise
from gateway.planner.catalogue import (
    Host,
    Measured,
    find_model_config,
    gpus,
    hub_id,
    known_models,
    parse_inventory,
    read_profile,
)
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.cost import Link, Step, Workload, layer_seconds, stage_seconds
from gateway.planner.split import StageCost, cut
from gateway.planner.types import Request
from stageline.errors import ConfigError
from stages.partition import LayerRange, check_cover, num_parameters, parse_layer_ranges

KNOWN = gpus()
GB = 10**9


def request(model: str = "qwen2-72b", inventory: str = "a100-80g:4", **changes) -> Request:
    devices = parse_inventory(inventory, KNOWN)
    return replace(Request(model=model, config=find_model_config(model), gpus=devices), **changes)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen2-0.5b", 0.494), ("qwen2-1.5b", 1.544), ("qwen2-7b", 7.616), ("qwen2-72b", 72.706)],
)
def test_the_family_ships_by_name(name: str, billions: float) -> None:
    for model in (name, f"{name}-instruct"):
        config = find_model_config(model)
        count = num_parameters(config, LayerRange(0, config.num_layers))
        assert round(count / GB, 3) == billions
        assert hub_id(model).lower() == f"qwen/{model}"
    assert len(known_models()) == 8


@given(data=st.data(), num_layers=st.integers(1, 9))
def test_cut_is_the_best_of_all_cuts(data: st.DataObject, num_layers: int) -> None:
    num_stages = data.draw(st.integers(1, min(4, num_layers)))
    costs = [
        StageCost(
            layer_s=data.draw(st.sampled_from([1.0, 1.5, 2.0])),
            fixed_s=data.draw(st.sampled_from([0.0, 0.7, 1.4])),
            memory_bytes=data.draw(st.sampled_from([20, 40, 90])),
            layer_bytes=5,
            fixed_bytes=data.draw(st.sampled_from([0, 7])),
        )
        for _ in range(num_stages)
    ]
    wanted = data.draw(st.sampled_from([0, 3, 1000]))

    def tokens(lengths) -> float:
        return min(cost.kv_tokens(n) for cost, n in zip(costs, lengths, strict=True))

    def seconds(lengths) -> float:
        return max(cost.seconds(n) for cost, n in zip(costs, lengths, strict=True))

    every = [
        lengths
        for lengths in itertools.product(range(1, num_layers + 1), repeat=num_stages)
        if sum(lengths) == num_layers and tokens(lengths) >= 1
    ]
    found = cut(num_layers, costs, min_tokens=1, wanted_tokens=wanted)
    if not every:
        assert found == []
        return
    assert sum(found) == num_layers
    enough = min(wanted, max(map(tokens, every)))
    fastest = min(seconds(lengths) for lengths in every if tokens(lengths) >= enough)
    assert seconds(found) == fastest
    assert tokens(found) == max(tokens(lengths) for lengths in every if seconds(lengths) <= fastest)


@pytest.mark.parametrize(
    ("model", "inventory"),
    [
        ("qwen2-72b", "a100-80g:4"),
        ("qwen2-72b", "l40s-48g:8"),
        ("qwen2-72b", "l40s-48g:4,a10g-24g:2"),
        ("qwen2-72b", "a10g-24g:3,h100-80g:2,l40s-48g:1"),
        ("qwen2-7b-instruct", "l4-24g:2"),
        ("qwen2-0.5b", "a100-40g:1"),
    ],
)
def test_every_byte_of_each_gpu_is_accounted_for(model: str, inventory: str) -> None:
    wanted = request(model, inventory)
    plan = make_cluster_plan(wanted)
    assert plan.fits
    check_cover(parse_layer_ranges(plan.layers()), wanted.config.num_layers)
    twice = num_parameters(wanted.config, LayerRange(0, 1)) - num_parameters(wanted.config, LayerRange(1, 2))
    tied = wanted.config.tie_word_embeddings and len(plan.stages) > 1
    assert sum(s.parameters for s in plan.stages) == plan.parameters + (twice if tied else 0)
    for stage in plan.stages:
        memory = stage.memory
        parts = (
            memory.weight_bytes,
            memory.kv_cache_bytes,
            memory.activation_bytes,
            memory.cuda_reserve_bytes,
            memory.unassigned_bytes,
        )
        assert sum(parts) == memory.total_bytes == KNOWN[stage.gpu].memory_bytes
        assert memory.unassigned_bytes >= memory.total_bytes // 10
        assert memory.kv_cache_bytes == plan.kv_capacity_tokens * stage.kv_bytes_per_token
        assert stage.kv_capacity_tokens >= plan.kv_capacity_tokens
    assert plan.kv_capacity_tokens == min(s.kv_capacity_tokens for s in plan.stages) == plan.num_blocks * 256


def test_the_default_of_the_72b() -> None:
    plan = make_cluster_plan(request())
    assert plan.parameters == 72_706_203_648
    lengths = [stage.num_layers for stage in plan.stages]
    assert sum(lengths) == 80
    assert lengths[3] < min(lengths[:3])
    assert lengths[3] + 1.42 <= max(lengths)


@pytest.mark.parametrize(("inventory", "bandwidth"), [("a100-80g:4", 2039e9), ("l40s-48g:8", 864e9)])
def test_latency_of_one_sequence_is_that_of_reading_the_weights(inventory: str, bandwidth: float) -> None:
    wanted = request(inventory=inventory)
    no_network = replace(wanted, link=Link(bytes_per_s=math.inf, latency_s=0.0, software_bytes_per_s=math.inf))
    performance = make_cluster_plan(no_network).performance
    assert performance is not None
    # A token reads every parameter but the embedding, and the keys and values of 2,048 tokens (320 KiB each).
    by_hand = ((72_706_203_648 - 152_064 * 8192) * 2 + 2048 * 327_680) / bandwidth
    assert performance.latency_s_per_token == pytest.approx(by_hand, rel=1e-4)
    with_network = make_cluster_plan(wanted).performance
    assert with_network is not None
    hops = len(wanted.gpus) + 1
    between = (hops - 2) * 16384 / 0.95e9
    assert with_network.latency_s_per_token == pytest.approx(by_hand + hops * 0.0003 + between, rel=1e-4)


def test_a_slow_link_binds_and_is_named() -> None:
    slow = request(link=Link(bytes_per_s=1e9 / 8 / 100))
    plan = make_cluster_plan(slow)
    advice = advise(slow, plan, KNOWN)
    assert advice.binding == "link bandwidth"
    assert advice.throughput_gain["link bandwidth"] > 1.5
    fast = request()
    assert advise(fast, make_cluster_plan(fast), KNOWN).binding in ("memory", "memory bandwidth")


def test_prefill_is_bound_by_compute() -> None:
    performance = make_cluster_plan(request()).performance
    assert performance is not None
    # 2 operations a parameter and token, four GPUs of 312 TFLOP/s, 21 layers of 80 on the slowest.
    bound = 4 * 312e12 / (2 * 80 * 877_684_736) * (20 / 21)
    assert 0.9 * bound < performance.prefill_tokens_per_s < bound


def test_more_memory_means_more_sequences_and_tokens_per_second() -> None:
    small, large = (make_cluster_plan(request(inventory=text)).performance for text in ("h100-80g:4", "h200-141g:4"))
    assert small is not None
    assert large is not None
    assert large.sequences > small.sequences
    assert large.tokens_per_s > small.tokens_per_s


def test_equal_gpus_can_be_several_pipelines() -> None:
    plan = make_cluster_plan(request(inventory="a100-80g:8", num_stages=4))
    assert (plan.num_pipelines, len(plan.stages)) == (2, 4)
    assert plan.stages == make_cluster_plan(request()).stages


def test_a_plan_that_does_not_fit_says_what_does() -> None:
    wanted = request(inventory="l4-24g:4")
    plan = make_cluster_plan(wanted)
    assert not plan.fits
    assert plan.performance is None
    assert min(stage.memory.unassigned_bytes for stage in plan.stages) < 0
    lines = advise(wanted, plan, KNOWN).help
    assert any("a100-80g:4 would fit" in line for line in lines)
    [more] = [line.removesuffix(" would fit") for line in lines if line.startswith("l4-24g:")]
    assert make_cluster_plan(request(inventory=more)).fits
    fewer = f"l4-24g:{int(more.partition(':')[2]) - 1}"
    assert not make_cluster_plan(request(inventory=fewer)).fits


def test_a_cut_by_hand_that_does_not_fit_is_told_apart_from_gpus_that_do_not() -> None:
    wanted = request(layers="0-10,10-20,20-30,30-80")
    plan = make_cluster_plan(wanted)
    assert not plan.fits
    assert "leave --stages and --layers out" in advise(wanted, plan, KNOWN).help[0]


def test_the_order_of_kinds_is_chosen() -> None:
    a, b = (make_cluster_plan(request(inventory=text)) for text in ("l40s-48g:4,a10g-24g:2", "a10g-24g:2,l40s-48g:4"))
    assert a.performance is not None
    assert b.performance is not None
    assert a.performance.tokens_per_s == b.performance.tokens_per_s


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a100-80g:0", "GPU_COUNT_INVALID"),
        ("a100-80g:-1", "GPU_COUNT_INVALID"),
        ("a100-80g:two", "GPU_COUNT_INVALID"),
        ("a100-80g:", "GPU_COUNT_INVALID"),
        ("", "UNKNOWN_GPU"),
        ("a100-80g:2,a100-80g:2", "GPU_REPEATED"),
        ("b100:2", "UNKNOWN_GPU"),
        ("v100-32g:8", "GPU_NOT_SUPPORTED"),
    ],
)
def test_wrong_inventories_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_inventory(text, KNOWN)
    assert caught.value.reason == reason
    if reason != "GPU_COUNT_INVALID" and reason != "GPU_REPEATED":
        assert all(name in caught.value.message for name in KNOWN)


@pytest.mark.parametrize(
    ("inventory", "changes", "reason"),
    [
        ("a100-80g:4", {"num_stages": 5}, "NOT_ENOUGH_GPUS"),
        ("a100-80g:4", {"num_stages": 3}, "STAGES_GPUS_DIFFER"),
        ("a100-80g:4,l4-24g:4", {"num_stages": 4}, "STAGES_GPUS_DIFFER"),
        ("a100-80g:4", {"layers": "0-40,40-80,80-81,81-82"}, "LAYERS_OUT_OF_RANGE"),
        ("a100-80g:81", {}, "TOO_MANY_STAGES"),
    ],
)
def test_stages_and_gpus_must_go_together(inventory: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_cluster_plan(request(inventory=inventory, **changes))
    assert caught.value.reason == reason


def test_a_profile_adds_devices(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "gpus: {mine: {memory_mib: 98304, memory_gb_per_s: 1800, bf16_tflops: 400, step_overhead_s: 0.001}}"
    )
    mine = read_profile(str(path))["mine"]
    assert (mine.memory_bytes, mine.memory_bytes_per_s, mine.step_overhead_s) == (96 << 30, 1.8e12, 0.001)
    quick = replace(mine, step_overhead_s=0.0)
    config = find_model_config("qwen2-7b")
    slow, fast = (
        make_cluster_plan(Request(model="m", config=config, gpus=(gpu,) * 2)).stages[0].decode_one_s
        for gpu in (mine, quick)
    )
    assert slow == pytest.approx(fast + 0.001)
    for text in ("{", "[]", "gpus: {x: {memory_mib: 1}}", "gpus: {x: {memory_mib: 1, memory_gb_per_s: 1, bf16_tflops: 0}}",
                 "gpus: {x: {memory_mib: 1, memory_gb_per_s: 1, bf16_tflops: 1, colour: red}}"):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match="--profile"):
            read_profile(str(path))


def test_workload_limits_bound_what_runs_at_once() -> None:
    plan = make_cluster_plan(request(workload=Workload(context_tokens=64, max_step_sequences=8)))
    assert plan.performance is not None
    assert plan.performance.sequences == plan.performance.in_flight * 8


def test_the_table_of_the_operating_guide_is_the_planners() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9:,-]+:\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \|$", guide, re.MULTILINE)
    assert len(rows) == 5
    for inventory, latency_ms, kv_tokens, tokens_per_s in rows:
        plan = make_cluster_plan(request(inventory=inventory))
        assert plan.performance is not None
        shown = (
            round(1e3 * plan.performance.latency_s_per_token),
            plan.kv_capacity_tokens,
            round(plan.performance.tokens_per_s),
        )
        assert shown == tuple(int(text.replace(",", "")) for text in (latency_ms, kv_tokens, tokens_per_s)), inventory


MEASURED = Measured(layer_s=((1, 0.001), (101, 0.101)), head_s=((1, 0.01),))
SLOWER = Measured(layer_s=((1, 0.002), (101, 0.202)), head_s=((1, 0.02),))


def on_one_host(cores: int, host: Mapping[str, Any] = MappingProxyType({}), **changes) -> Request:
    """The 0.5B in four stages whose times are known, on one machine; hops and attention cost nothing unless `host` says so."""
    gpu = replace(KNOWN["a100-80g"], measured=MEASURED, host=Host(cores=cores, **{"busy": SLOWER, **host}))
    no_network = Link(bytes_per_s=math.inf, latency_s=0.0, software_bytes_per_s=math.inf)
    return replace(request("qwen2-0.5b"), gpus=(gpu,) * 4, link=no_network, **changes)


def test_stages_of_one_host_share_its_cores() -> None:
    """By hand: 24 layers and `lm_head` in a row; one core computes at its own pace, two at half of it each."""
    workload = Workload(sequences=4)
    one, two, many = (make_cluster_plan(on_one_host(n, workload=workload)).performance for n in (1, 2, 64))
    assert one is not None
    assert two is not None
    assert many is not None
    ring_s = 24 * 0.001 + 0.01
    assert (one.sequences, one.in_flight) == (4, 4)
    assert one.tokens_per_s == pytest.approx(1 / ring_s)
    assert two.tokens_per_s == pytest.approx(2 / (2 * ring_s))
    assert many.tokens_per_s > 2.5 * one.tokens_per_s  # bound by the slowest stage, and hardly slowed down
    for performance in (one, two, many):  # a token alone uses one core
        assert performance.latency_s_per_token == pytest.approx(ring_s)
    apart = make_cluster_plan(replace(on_one_host(2), gpus=(replace(KNOWN["a100-80g"], measured=MEASURED),) * 4))
    assert apart.performance is not None
    assert apart.performance.tokens_per_s > two.tokens_per_s
    wanted = on_one_host(2, workload=workload)
    assert advise(wanted, make_cluster_plan(wanted), KNOWN).binding == "cores"


def test_a_crowd_hops_and_the_rest_of_the_system_take_their_part_of_the_cores() -> None:
    """By hand: four stages on two cores, crowded to three times the seconds, with 2 ms of core time a hop, beside half a core."""
    crowded = Measured(layer_s=((1, 0.003), (101, 0.303)), head_s=((1, 0.03),))
    host = {"crowded": crowded, "hop_core_s": 0.002, "background_cores": 0.5}
    performance = make_cluster_plan(on_one_host(2, host, workload=Workload(sequences=4))).performance
    assert performance is not None
    assert performance.tokens_per_s == pytest.approx(1.5 / (3 * (24 * 0.001 + 0.01) + 4 * 0.002))


def test_sequences_that_decode_at_once_can_be_given_and_fly_as_the_scheduler_has_them() -> None:
    few = make_cluster_plan(request(workload=Workload(sequences=3))).performance
    assert few is not None
    assert (few.sequences, few.in_flight) == (3, 3)
    full = make_cluster_plan(request()).performance
    assert full is not None
    assert full.in_flight == 4  # hops are shorter than reading a stage's weights: one more would not pay
    slow = make_cluster_plan(request(link=Link(latency_s=0.01))).performance
    assert slow is not None
    assert slow.in_flight == 5


def test_what_a_process_holds_comes_from_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    values = {"memory_mib": 81920, "memory_gb_per_s": 2000, "bf16_tflops": 300, "reserve_mib": 300}
    known = {"layer_s": {1: 0.001}, "head_s": {1: 0.004}}
    path.write_text(yaml.safe_dump({"gpus": {"mine": values | {"host": {"cores": 2, "busy": known}}}}))
    mine = read_profile(str(path))["mine"]
    assert mine.reserve_bytes == 300 << 20
    assert mine.host == Host(cores=2, busy=Measured(layer_s=((1, 0.001),), head_s=((1, 0.004),)))
    [stage] = make_cluster_plan(replace(request("qwen2-0.5b"), gpus=(mine,))).stages
    assert stage.memory.cuda_reserve_bytes == 300 << 20
    with pytest.raises(ConfigError, match="share the cores of one machine"):
        make_cluster_plan(replace(request("qwen2-0.5b"), gpus=(mine, replace(mine, host=None))))
    for wrong in ({"reserve_mib": -1}, {"host": {"cores": 0}}, {"host": {}}, {"host": {"cores": 2, "speed": 1}}):
        path.write_text(yaml.safe_dump({"gpus": {"mine": values | wrong}}))
        with pytest.raises(ConfigError, match="--profile"):
            read_profile(str(path))


def test_a_measured_profile_goes_before_the_rates(tmp_path: Path) -> None:
    """Tables are read as lines between their points, in proportion beyond them, and attention comes on top."""
    known = {
        "layer_s": {1: 0.001, 17: 0.002, 100: 0.01},
        "head_s": {1: 0.004},
        "kv_token_s": 1e-6,
        "attended_token_s": 1e-7,
    }
    values = {"memory_mib": 98304, "memory_gb_per_s": 1, "bf16_tflops": 1, "step_overhead_s": 0.5, "measured": known}
    file = tmp_path / "gpus.yaml"
    file.write_text(yaml.safe_dump({"gpus": {"mine": values}}))
    mine = read_profile(str(file))["mine"]
    config = find_model_config("qwen2-0.5b")
    step = Step(tokens=9, output_rows=2, attended_tokens=9000, kv_tokens=1000)
    assert layer_seconds(config, mine, step, 2) == pytest.approx(0.0015 + 0.001)
    assert layer_seconds(config, mine, replace(step, tokens=200, kv_tokens=0), 2) == pytest.approx(0.02 + 0.0009)
    assert stage_seconds(config, LayerRange(20, 24), mine, step, 2) == pytest.approx(0.5 + 4 * 0.0025 + 0.008)
    assert stage_seconds(config, LayerRange(0, 4), mine, step, 2) == pytest.approx(0.5 + 4 * 0.0025)
    for wrong in ({"layer_s": {}}, {"layer_s": {1: -1}}, {"head_ms": {1: 1}}, {"kv_token_s": -1}):
        file.write_text(yaml.safe_dump({"gpus": {"mine": values | {"measured": known | wrong}}}))
        with pytest.raises(ConfigError, match="--profile"):
            read_profile(str(file))
