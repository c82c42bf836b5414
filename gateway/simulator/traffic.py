"""Requests: when they come and how long they are. The same seed gives the same ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.simulator.scenario import Traffic


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when (seconds) and how many tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def rate_at(traffic: Traffic, at_s: float) -> float:
    """Requests a second at a moment of the day."""
    return traffic.requests_per_s * (1 - traffic.daily_swing * math.cos(2 * math.pi * at_s / traffic.day_s))


def arrivals(traffic: Traffic, duration_s: float, seed: int) -> Iterator[Arrival]:
    """Open loop: a Poisson process whose rate changes, by thinning (Lewis and Shedler, 1979)."""
    rng = random.Random(seed)
    most = traffic.requests_per_s * (1 + traffic.daily_swing)
    at_s = 0.0
    while most > 0:
        at_s += rng.expovariate(most)
        if at_s >= duration_s:
            return
        if rng.random() * most < rate_at(traffic, at_s):
            yield Arrival(at_s, *lengths(traffic, rng))


def lengths(traffic: Traffic, rng: random.Random) -> tuple[int, int]:
    """Prompt and output tokens of one request."""

    def draw(median: int) -> int:
        factor = min(traffic.max_factor, rng.lognormvariate(0.0, traffic.sigma)) if traffic.sigma else 1.0
        return max(1, round(median * factor))

    return draw(traffic.prompt_tokens), draw(traffic.output_tokens)
