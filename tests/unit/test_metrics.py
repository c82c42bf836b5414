"""Our histograms say what prometheus_client's say."""

from __future__ import annotations

import math
import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.genai_metrics import RequestTimes
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


def test_whole_requests_have_the_names_of_opentelemetry():
    metrics = Metrics("m", lambda: ())
    said = {"operation": "chat", "num_input_tokens": 5}
    metrics.genai.ended(RequestTimes(**said, num_output_tokens=11, first_token_s=0.5, duration_s=1.5))
    metrics.genai.ended(RequestTimes(**said, num_output_tokens=1, first_token_s=0.25, duration_s=0.25))
    metrics.genai.ended(RequestTimes(**said, num_output_tokens=4, first_token_s=0.1, duration_s=2, error="CANCELLED"))
    metrics.genai.ended(RequestTimes(**said, num_output_tokens=0, first_token_s=None, duration_s=3, error="QUEUE_FULL"))
    common = {
        "gen_ai_operation_name": "chat", "gen_ai_provider_name": "stageline",
        "gen_ai_request_model": "m", "gen_ai_response_model": "m",
    }  # fmt: skip
    families = {one.name: one for one in text_string_to_metric_families(metrics.render().decode())}

    def told(name: str, ends: str, **labels: str) -> float:
        [value] = [s.value for s in families[name].samples if s.name == name + ends and s.labels == common | labels]
        return value

    duration, ttft = "gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds"
    tpot, usage = "gen_ai_server_time_per_output_token_seconds", "gen_ai_client_token_usage"
    assert [told(duration, "_count", error_type=name) for name in ("", "CANCELLED", "QUEUE_FULL")] == [2, 1, 1]
    assert told(duration, "_sum", error_type="") == 1.75
    assert (told(ttft, "_count"), told(ttft, "_sum")) == (2, 0.75), "of successful requests"
    assert (told(tpot, "_count"), told(tpot, "_sum")) == (1, pytest.approx(0.1)), "of tokens after the first"
    assert (told(usage, "_count", gen_ai_token_type="input"), told(usage, "_sum", gen_ai_token_type="input")) == (3, 15)
    assert told(usage, "_sum", gen_ai_token_type="output") == 16
    assert told(usage, "_bucket", gen_ai_token_type="output", le="4.0") == 2
    # As the conventions list them (open-telemetry/semantic-conventions-genai, gen-ai-metrics.md).
    bounds = {name: [float(s.labels["le"]) for s in families[name].samples if "le" in s.labels] for name in families}
    assert bounds[duration][:14] == [0.01 * 2**n for n in range(14)]
    assert bounds[ttft] == [.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, math.inf]  # fmt: skip
    assert bounds[tpot] == [.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, math.inf]  # fmt: skip
    assert bounds[usage] == 2 * [*(4**n for n in range(14)), math.inf]


def test_a_pipeline_without_blocks_uses_none():
    status = PipelineStatus(id="0", epoch=0, state="forming", stages=())
    text = Metrics("m", lambda: (status,)).render().decode()
    assert 'stageline:kv_cache_usage_perc{model_name="m",pipeline="0"} 0.0' in text
    assert 'stageline:pipeline_ready{model_name="m",pipeline="0"} 0.0' in text
