"""What tokens cost: the price of an hour of every GPU over the tokens of that hour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gateway.planner.types import ClusterPlan
from stageline.errors import ConfigError

PAID = "every GPU is paid for all day, spares too; gateway, head, disks and traffic are not in it"
ROOFLINE = "times are rooflines unless the profile holds measured ones, so this is a lower bound"
FULL = "the pipelines are full all day, as the plan's throughput has them"
APART = "a request pays for its output tokens at the rate of decoding alone and for its prompt at that of prompts alone"
SIMULATED = "the traffic is the simulated one; output tokens pay for their prompts too"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a plan that fits, or of simulated traffic (then there is no price of prompts: output tokens carry them).

    `gpu_dollars_per_hour` by kind of GPU, `num_gpus` and `dollars_per_hour` of all, spares included.
    """

    gpu_dollars_per_hour: Mapping[str, float]
    num_gpus: int
    dollars_per_hour: float
    dollars_per_million_output_tokens: float | None
    dollars_per_million_prompt_tokens: float | None
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def parse_prices(text: str, kinds: Mapping[str, int]) -> dict[str, float]:
    """`2.00`, for every kind of `kinds`, or `l40s-48g:0.80,a10g-24g:0.35`, which names each of them once → dollars an hour of
    one GPU.

    Raises ConfigError where a price is not a number over 0, and where the names are not those of the GPUs.
    """
    parts = [part.strip().rpartition(":") for part in text.split(",")]
    prices = {name: _price(text, value) for name, _, value in parts}
    if len(prices) < len(parts) or ("" in prices and len(prices) > 1):
        raise _error(text, "expected one price for all GPUs, or one for each kind")
    if "" in prices:
        return dict.fromkeys(kinds, prices[""])
    if prices.keys() != kinds.keys():
        raise _error(text, f"expected a price for each of {', '.join(kinds)} and no other")
    return prices


def plan_cost(plan: ClusterPlan, prices: Mapping[str, float]) -> Cost | None:
    """What tokens of a plan cost at `prices` (dollars an hour of one GPU, by kind); None for a plan that does not fit."""
    if plan.performance is None:
        return None
    hour = _hour(plan.gpu_counts(), prices)
    return Cost(
        gpu_dollars_per_hour=dict(prices),
        num_gpus=sum(plan.gpu_counts().values()),
        dollars_per_hour=hour,
        dollars_per_million_output_tokens=_per_million(hour, plan.performance.tokens_per_s * plan.num_pipelines),
        dollars_per_million_prompt_tokens=_per_million(
            hour, plan.performance.prefill_tokens_per_s * plan.num_pipelines
        ),
        assumptions=(PAID, FULL, APART, ROOFLINE),
    )


def traffic_cost(counts: Mapping[str, int], prices: Mapping[str, float], output_tokens_per_s: float) -> Cost:
    """What simulated traffic costs for each token generated, its prompts included; no price where nothing was generated."""
    hour = _hour(counts, prices)
    return Cost(
        gpu_dollars_per_hour=dict(prices),
        num_gpus=sum(counts.values()),
        dollars_per_hour=hour,
        dollars_per_million_output_tokens=_per_million(hour, output_tokens_per_s) if output_tokens_per_s else None,
        dollars_per_million_prompt_tokens=None,
        assumptions=(PAID, SIMULATED, ROOFLINE),
    )


def _hour(counts: Mapping[str, int], prices: Mapping[str, float]) -> float:
    return sum(count * prices[kind] for kind, count in counts.items())


def _per_million(dollars_per_hour: float, tokens_per_s: float) -> float:
    return dollars_per_hour / (tokens_per_s * 3600) * 1e6


def _price(text: str, value: str) -> float:
    try:
        price = float(value)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise _error(text, f"{value!r} is not a number of dollars over 0")
    return price


def _error(text: str, problem: str) -> ConfigError:
    return ConfigError(
        "GPU_PRICE_INVALID",
        f"--gpu-dollars-per-hour {text}: {problem}, such as 2.00 or l40s-48g:0.80,a10g-24g:0.35",
        field="gpu_dollars_per_hour",
        value=text,
    )
