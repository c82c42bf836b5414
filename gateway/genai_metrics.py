"""Metrics of whole requests under the names of OpenTelemetry's GenAI semantic conventions (status: development), as Prometheus
writes them: `gen_ai.server.request.duration` in seconds is `gen_ai_server_request_duration_seconds`. Buckets are the conventions'."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from gateway.histogram import Histogram

PROVIDER_NAME = "stageline"
DURATION_BUCKETS_S = (.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)  # fmt: skip
TTFT_BUCKETS_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10)  # fmt: skip
TPOT_BUCKETS_S = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5)  # fmt: skip
TOKEN_BUCKETS = tuple(4**power for power in range(14))
_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_response_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """What is known of a request when it ends. Seconds from when the engine got it: `first_token_s` until the door had its first
    token, None where there was none, `duration_s` until its last one, or its end. `num_input_tokens` with what the prefix
    cache saved; `num_output_tokens` of all choices. `error`: why it failed, "" where it did not.
    """

    operation: str
    num_input_tokens: int
    num_output_tokens: int
    first_token_s: float | None
    duration_s: float
    error: str = ""


class GenAiMetrics:
    """One observation a request, when it ends: nothing is paid for each token."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model_name = model_name
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds", "Of requests, until the last token; error_type: those that failed.",
            (*_LABELS, "error_type"), DURATION_BUCKETS_S,
        )  # fmt: skip
        self._ttft = Histogram(
            "gen_ai_server_time_to_first_token_seconds", "Of requests that succeeded.", _LABELS, TTFT_BUCKETS_S
        )
        self._tpot = Histogram(
            "gen_ai_server_time_per_output_token_seconds", "After the first, of requests that succeeded.",
            _LABELS, TPOT_BUCKETS_S,
        )  # fmt: skip
        self._usage = Histogram(
            "gen_ai_client_token_usage", "Tokens of a request, by gen_ai_token_type.",
            (*_LABELS, "gen_ai_token_type"), TOKEN_BUCKETS,
        )  # fmt: skip
        for one in (self._duration, self._ttft, self._tpot, self._usage):
            registry.register(one)

    def ended(self, request: RequestTimes) -> None:
        """A request that the engine got has ended. One that computed nothing used no tokens."""
        labels = (request.operation, PROVIDER_NAME, self._model_name, self._model_name)
        self._duration.of(*labels, request.error).observe(request.duration_s)
        if request.first_token_s is not None and not request.error:
            self._ttft.of(*labels).observe(request.first_token_s)
            if request.num_output_tokens > 1:
                decoding_s = request.duration_s - request.first_token_s
                self._tpot.of(*labels).observe(decoding_s / (request.num_output_tokens - 1))
        if request.first_token_s is not None or not request.error:
            self._usage.of(*labels, "input").observe(request.num_input_tokens)
            self._usage.of(*labels, "output").observe(request.num_output_tokens)
