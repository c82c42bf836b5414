"""Numbers for Prometheus. They have the names that vLLM's users have dashboards for, with the prefix `stageline:`; those of whole
requests have OpenTelemetry's too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.genai_metrics import GenAiMetrics
from gateway.histogram import Buckets, Histogram
from gateway.types import FinishReason, PipelineStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "stageline:"
TTFT_BUCKETS_S = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
ITL_BUCKETS_S = (.005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
E2E_BUCKETS_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip

# Of every pipeline, read when somebody asks.
_GAUGES: tuple[tuple[str, str, Callable[[PipelineStatus], float]], ...] = (
    ("num_requests_running", "Sequences that hold KV blocks.", lambda one: one.num_running_sequences),
    ("num_requests_waiting", "Sequences that wait in the queue.", lambda one: one.num_waiting_sequences),
    ("num_waiting_tokens", "Tokens of the sequences that wait.", lambda one: one.num_waiting_tokens),
    (
        "kv_cache_usage_perc",
        "Share of the KV blocks that sequences hold, from 0 to 1; cached prefixes count as free.",
        lambda one: 1 - one.num_free_blocks / one.num_blocks if one.num_blocks else 0.0,
    ),
    (
        "pipeline_ready",
        "1 while the pipeline returns its steps, else 0.",
        lambda one: one.state in ("ready", "draining"),
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[PipelineStatus], float]], ...] = (
    ("num_preemptions", "Sequences that lost their KV blocks to others.", lambda one: one.num_preemptions),
    ("num_recoveries", "Times the pipeline became ready again after it broke.", lambda one: one.num_recoveries),
)


class _PipelineCollector(Collector):
    """Reads the pipelines at each scrape."""

    def __init__(self, model_name: str, pipelines: Callable[[], Sequence[PipelineStatus]]) -> None:
        self._model_name, self._pipelines = model_name, pipelines

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        pipelines = self._pipelines()
        for family, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, read in rows:
                metric = family(PREFIX + name, text, labels=("model_name", "pipeline"))
                for one in pipelines:
                    metric.add_metric((self._model_name, one.id), read(one))
                yield metric


class _Generated(Collector):
    """Tokens generated: a first one or a next one each."""

    def __init__(self, model_name: str, first: Buckets, following: Buckets) -> None:
        self._model_name, self._first, self._following = model_name, first, following

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        family = CounterMetricFamily(PREFIX + "generation_tokens", "Tokens generated.", labels=("model_name",))
        family.add_metric((self._model_name,), self._first.count + self._following.count)
        yield family


class Metrics:
    """All metrics of one engine, in a registry of their own. Every time is in seconds, of one choice (sequence)."""

    def __init__(self, model_name: str, pipelines: Callable[[], Sequence[PipelineStatus]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_PipelineCollector(model_name, pipelines))
        self._model_name = model_name
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens of a sequence.", ITL_BUCKETS_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", E2E_BUCKETS_S)
        self._generated = _Generated(model_name, self._ttft, self._itl)
        self.registry.register(self._generated)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the sequences that got a token.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of those, what the prefix cache saved.")
        self._success = self._registered("request_success", "Sequences that ended, by reason.", "finished_reason")
        self._failures = self._registered("request_failures", "Requests that ended with an error.", "reason")
        self._rejected = self._registered("requests_rejected", "Requests that were never queued.", "reason")
        self._cancelled = self._counter("requests_cancelled", "Requests that their clients gave up.")
        self._checks = self._counter("invariant_checks", "Times the idle engine looked for leaks.")
        self._violations = self._counter("invariant_violations", "What it found. Ever more than 0: a bug of ours.")
        self.genai = GenAiMetrics(model_name, self.registry)

    def first_token(self, seconds: float, *, prompt_tokens: int, cached_tokens: int) -> None:
        """A sequence got its first token `seconds` after its request came."""
        self._ttft.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)

    def next_token(self, seconds: float) -> None:
        """A sequence got another token `seconds` after the one before."""
        self._itl.observe(seconds)

    def finished(self, reason: FinishReason, seconds: float) -> None:
        """A sequence ended `seconds` after its request came."""
        self._success.labels(self._model_name, reason.value).inc()
        self._e2e.observe(seconds)

    def failed(self, reason: str) -> None:
        """A request that was queued ended with an error."""
        self._failures.labels(self._model_name, reason).inc()

    def rejected(self, reason: str) -> None:
        """A request was refused before it was queued."""
        self._rejected.labels(self._model_name, reason).inc()

    def cancelled(self) -> None:
        """A client gave a request up."""
        self._cancelled.inc()

    def checked(self, num_violations: int) -> None:
        """The idle engine was checked."""
        self._checks.inc()
        self._violations.inc(num_violations)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """One number of the whole engine, read at each scrape."""
        family = Gauge(PREFIX + name, text, ("model_name",), registry=self.registry)
        family.labels(self._model_name).set_function(read)

    def render(self) -> bytes:
        """Prometheus' text format, `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Buckets:
        histogram = Histogram(PREFIX + name, text, ("model_name",), bounds)
        self.registry.register(histogram)
        return histogram.of(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return self._registered(name, text).labels(self._model_name)

    def _registered(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name", *labels), registry=self.registry)
