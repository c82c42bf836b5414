"""Spans of calls: one of kind server for each, and below it where the time went. Names: OpenTelemetry's GenAI conventions.

No span has text of a prompt or of an answer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.genai_metrics import PROVIDER_NAME
from gateway.tracing import call as calls
from gateway.tracing.work import RequestWork
from gateway.types import FinishReason, GenerateRequest, ModelInfo, ScoreRequest
from stageline.errors import StagelineError

Attributes = dict[str, str | int | float | bool]

_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_W3C = TraceContextTextMapPropagator()


def otlp_provider(endpoint: str | None, sample_ratio: float | None) -> TracerProvider:
    """Sends spans over OTLP gRPC from a thread of its own; a queue that is full drops them. What is None comes from the
    standard OTEL_* variables, which hold for all the rest too."""
    sampler: Sampler | None = None if sample_ratio is None else ParentBased(TraceIdRatioBased(sample_ratio))
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(sampler=sampler, resource=Resource.create({} if named else {SERVICE_NAME: "stageline"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Begins traces, or goes on with those of the callers. One for both doors of a gateway."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("stageline")

    @contextmanager
    def call(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Iterator[Call | None]:
        """Around one call: its server span, a child of the caller's in `headers` (`traceparent`, `tracestate`).

        Yields None, and records nothing, where the sampler leaves the call out.
        """
        span = self._tracer.start_span(name, _W3C.extract(headers), SpanKind.SERVER, attributes)
        call = Call(self._tracer, span) if span.is_recording() else None
        token = calls.current.set(call)
        try:
            yield call
        finally:
            calls.current.reset(token)
            span.end()

    async def stop(self) -> None:
        """Send what waits."""
        await asyncio.to_thread(self._provider.shutdown)


class Call:
    """One recorded call. Of several prompts in it each has its own child spans; the server span counts all of them."""

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self._tracer, self.span = tracer, span
        self._below = trace.set_span_in_context(span)
        self._wall_s = time.time() - time.monotonic()
        self._input_tokens = self._output_tokens = self._cached_tokens = 0
        self._finish_reasons: list[str] = []

    def accepted(self, request: GenerateRequest | ScoreRequest, model: ModelInfo) -> RequestWork:
        """The request is known. Returns what the engine is to fill."""
        span = self.span
        span.set_attribute("gen_ai.provider.name", PROVIDER_NAME)
        span.set_attribute("gen_ai.request.model", model.name)
        span.set_attribute("gen_ai.response.model", model.name)
        span.set_attribute("gen_ai.response.id", request.request_id)
        if isinstance(request, GenerateRequest):
            params = request.sampling
            span.set_attribute("gen_ai.request.max_tokens", params.max_tokens)
            span.set_attribute("gen_ai.request.temperature", params.temperature)
            span.set_attribute("gen_ai.request.top_p", params.top_p)
            span.set_attribute("gen_ai.request.top_k", params.top_k)
            if request.num_choices > 1:
                span.set_attribute("gen_ai.request.choice.count", request.num_choices)
            self._count(input_tokens=len(request.prompt_token_ids))
        else:
            num_scored = sum(map(len, request.continuations))
            self._count(input_tokens=len(request.context_token_ids) + num_scored)
        return RequestWork()

    def generated(self, num_tokens: int, cached_tokens: int, finish_reasons: list[FinishReason]) -> None:
        """An answer is over, however it ended."""
        self._count(output_tokens=num_tokens, cached_tokens=cached_tokens)
        self._finish_reasons += (reason.value for reason in finish_reasons)
        if self._finish_reasons:
            self.span.set_attribute("gen_ai.response.finish_reasons", self._finish_reasons)

    def worked(self, work: RequestWork, begun_s: float, ended_s: float) -> None:
        """Child spans of one request that was in the engine from `begun_s` to `ended_s` (monotonic clock)."""
        sent_s = ended_s if work.sent_s is None else work.sent_s
        first_s = ended_s if work.first_token_s is None else work.first_token_s
        self._child("queue", begun_s, sent_s)
        if work.sent_s is not None:
            self._child("prefill", sent_s, first_s)
        if work.first_token_s is not None:
            self._child("decode", first_s, ended_s)
        for stage in work.stages():
            self._child(
                f"stage {stage.layers}", stage.began_s, stage.ended_s,
                {
                    "stageline.pipeline": stage.pipeline,
                    "stageline.epoch": stage.epoch,
                    "stageline.stage.layers": stage.layers,
                    "stageline.stage.steps": stage.num_steps,
                    "stageline.stage.tokens": stage.num_tokens,
                    "stageline.stage.step_tokens": stage.num_step_tokens,
                    "stageline.stage.computing_s": stage.computing_s,
                    "stageline.stage.cpu_s": stage.cpu_s,
                    "stageline.stage.waiting_s": stage.waiting_s,
                },
            )  # fmt: skip

    def failed(self, code: str, error: StagelineError | None) -> None:
        """The call ended with a status other than OK, or was given up by its client."""
        self.span.set_attribute("error.type", error.reason if error is not None else code)
        if code in _SERVER_ERRORS or (code.isdigit() and int(code) >= 500):
            self.span.set_status(StatusCode.ERROR)

    def _count(self, *, input_tokens: int = 0, output_tokens: int = 0, cached_tokens: int = 0) -> None:
        self._input_tokens += input_tokens
        self._output_tokens += output_tokens
        self._cached_tokens += cached_tokens
        self.span.set_attribute("gen_ai.usage.input_tokens", self._input_tokens)
        self.span.set_attribute("gen_ai.usage.output_tokens", self._output_tokens)
        self.span.set_attribute("gen_ai.usage.cache_read.input_tokens", self._cached_tokens)

    def _child(self, name: str, begun_s: float, ended_s: float, attributes: Attributes | None = None) -> None:
        span = self._tracer.start_span(name, self._below, attributes=attributes, start_time=self._wall_ns(begun_s))
        span.end(self._wall_ns(max(begun_s, ended_s)))

    def _wall_ns(self, monotonic_s: float) -> int:
        return round((monotonic_s + self._wall_s) * 1e9)
