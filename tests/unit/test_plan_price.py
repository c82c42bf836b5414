"""Dollars of a million tokens: against sums made by hand, the command line, and what the guide says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.planner.catalogue import find_model_config, gpus, parse_inventory
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.price import parse_prices, plan_cost
from gateway.planner.types import ClusterPlan, Request
from stageline.errors import ConfigError


def plan(inventory: str, **changes) -> ClusterPlan:
    request = Request(model="m", config=find_model_config("qwen2-72b"), gpus=parse_inventory(inventory, gpus()))
    return make_cluster_plan(replace(request, **changes))


def test_two_pipelines_and_a_spare_of_one_kind() -> None:
    made = plan("a100-80g:8", num_stages=4, num_spares=1)
    cost = plan_cost(made, parse_prices("2.50", made.gpu_counts()))
    assert cost is not None
    assert made.performance is not None
    assert (cost.num_gpus, cost.dollars_per_hour) == (9, 22.5)
    tokens_an_hour = 2 * made.performance.tokens_per_s * 3600
    assert cost.dollars_per_million_output_tokens == pytest.approx(22.5 / tokens_an_hour * 1e6)
    assert cost.dollars_per_million_prompt_tokens == pytest.approx(
        22.5 / (2 * made.performance.prefill_tokens_per_s * 3600) * 1e6
    )


def test_each_kind_has_its_price_and_the_spare_is_of_the_larger() -> None:
    made = plan("l40s-48g:4,a10g-24g:2", num_spares=2)
    cost = plan_cost(made, parse_prices("a10g-24g:0.5, l40s-48g:1", made.gpu_counts()))
    assert cost is not None
    assert made.gpu_counts() == {"l40s-48g": 6, "a10g-24g": 2}
    assert cost.dollars_per_hour == 7.0


def test_what_does_not_fit_costs_nothing() -> None:
    assert plan_cost(plan("l4-24g:4", num_spares=1), {"l4-24g": 1.0}) is None


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "inf", "nan", "two", "1,2", "a:1", "a:1,b:2,c:3", "a:1,b:x", "a:1,a:1", "1,a:1,b:1"]
)
def test_wrong_prices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-dollars-per-hour") as caught:
        parse_prices(text, {"a": 1, "b": 1})
    assert caught.value.reason == "GPU_PRICE_INVALID"


def test_the_command_line_prints_it(capsys) -> None:
    args = ["--model", "qwen2-72b", "--gpu", "a100-80g:4", "--gpu-dollars-per-hour", "2.00"]
    assert main(["plan", *args, "--output", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    by_hand = 8 / (data["performance"]["tokens_per_s"] * 0.0036)
    assert data["cost"]["dollars_per_million_output_tokens"] == pytest.approx(by_hand)
    assert main(["plan", *args]) == 0
    table = capsys.readouterr().out
    assert f"${by_hand:.2f} a million output tokens" in table
    assert all(line in table for line in data["cost"]["assumptions"])
    guide = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    [shown] = re.findall(r"cost: .*", guide)
    assert shown in table
    assert main(["plan", "--model", "qwen2-72b", "--gpu-dollars-per-hour", "2.00"]) == 2
    assert "needs --gpu or --cluster" in capsys.readouterr().err


def test_simulated_traffic_has_a_price(capsys) -> None:
    args = ["simulate", "--model", "qwen2-72b", "--gpu", "a100-80g:4", "--spares", "1", "--duration-s", "20"]
    assert main([*args, "--gpu-dollars-per-hour", "2.00", "--output", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cost"]["dollars_per_hour"] == 10.0
    by_hand = 10 / (data["output_tokens_per_s"] * 0.0036)
    assert data["cost"]["dollars_per_million_output_tokens"] == pytest.approx(by_hand)
    assert main([*args, "--gpu-dollars-per-hour", "b:1"]) == 2
