"""Our histograms say what prometheus_client's say."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gateway.metrics import ITL_BUCKETS_S, Metrics
from gateway.types import FinishReason, PipelineStatus


def test_histograms_are_those_of_prometheus_client():
    metrics, registry = Metrics("m", lambda: ()), CollectorRegistry()
    twin = Histogram(
        "stageline:inter_token_latency_seconds", "Between tokens of a sequence.", ("model_name",),
        buckets=ITL_BUCKETS_S, registry=registry,
    ).labels("m")  # fmt: skip
    rng = random.Random(1)
    for seconds in [*ITL_BUCKETS_S, 0.0, 1e4, *(rng.expovariate(20) for _ in range(500))]:
        metrics.next_token(seconds)
        twin.observe(seconds)
    expected = [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    assert set(expected) <= set(metrics.render().decode().splitlines())
    assert any('le="+Inf"' in line and line.endswith(f" {502 + len(ITL_BUCKETS_S)}.0") for line in expected)


def test_every_token_is_generated_once():
    metrics = Metrics("m", lambda: ())
    metrics.first_token(0.1, prompt_tokens=7, cached_tokens=4)
    metrics.next_token(0.1)
    metrics.next_token(0.1)
    metrics.finished(FinishReason.STOP, 0.3)
    text = metrics.render().decode()
    assert 'stageline:generation_tokens_total{model_name="m"} 3.0' in text
    assert 'stageline:prompt_tokens_total{model_name="m"} 7.0' in text
    assert 'stageline:prompt_tokens_cached_total{model_name="m"} 4.0' in text
    assert 'stageline:request_success_total{finished_reason="stop",model_name="m"} 1.0' in text


def test_a_pipeline_without_blocks_uses_none():
    status = PipelineStatus(id="0", epoch=0, state="forming", stages=())
    text = Metrics("m", lambda: (status,)).render().decode()
    assert 'stageline:kv_cache_usage_perc{model_name="m",pipeline="0"} 0.0' in text
    assert 'stageline:pipeline_ready{model_name="m",pipeline="0"} 0.0' in text
