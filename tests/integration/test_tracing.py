"""Traces over real sockets: both doors in front of toy stages, and an OTLP collector behind them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from doors_helpers import Doors, open_doors
from engine_helpers import NUM_LAYERS, Cluster, byte_tokenizer, until
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import TracerProvider

from gateway.api.service import Frontend
from gateway.config import TracingSection
from gateway.tracing.call import open_tracing
from stageline.client import AsyncClient, Client
from stageline.errors import ConfigError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc
from stageline.inference.v1 import scoring_pb2

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"
SECRET = "this-prompt-is-nobodys-business"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(self, request, context):
        """OTLP."""
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[trace_pb2.Span]:
        """In order of their beginnings."""
        found = [s for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]
        return sorted(found, key=lambda span: (span.start_time_unix_nano, span.name))


def attributes(span: trace_pb2.Span) -> dict[str, object]:
    """Of any type; lists as lists."""
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@asynccontextmanager
async def traced(**section) -> AsyncIterator[tuple[Doors, Callable]]:
    """Doors, and a coroutine function that gives the spans of all calls so far. It can be called once."""
    collector = Collector()
    sink = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, sink)
    port = sink.add_insecure_port("127.0.0.1:0")
    sink.start()
    tracing = open_tracing(TracingSection(enabled=True, endpoint=f"http://127.0.0.1:{port}", **section))
    assert tracing is not None
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, delay_s=0.002)
    engine = await cluster.start()
    await until(engine.ready)
    doors = Doors()
    doors.frontend = Frontend(engine, byte_tokenizer(), None, engine.model, None, tracing)

    async def spans() -> list[trace_pb2.Span]:
        await tracing.stop()
        assert SECRET.encode() not in b"".join(one.SerializeToString() for one in collector.requests)
        assert not cluster.engine._keeper.feed.works, "nothing is kept of requests that ended"
        return collector.spans()

    try:
        async with open_doors(doors):
            yield doors, spans
    finally:
        await cluster.stop()
        sink.stop(0)


def generation(**fields) -> gen.Generation:
    return gen.Generation(text=SECRET, stop=gen.StopConditions(max_tokens=5), **fields)


async def test_a_stream_has_a_span_for_every_part_of_its_time() -> None:
    async with traced() as (doors, spans):
        async with grpc.aio.insecure_channel(doors.grpc) as channel:
            call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(
                pb.StreamGenerateRequest(generation=generation(request_id="mine")),
                metadata=(("traceparent", SAMPLED), ("tracestate", "them=1")),
            )
            assert [message async for message in call]
        found = await spans()
    by_name = {span.name: span for span in found}
    assert len(found) == len(by_name) == 6
    server = by_name.pop("stageline.inference.v1.InferenceService/StreamGenerate")
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert (server.kind, server.trace_state) == (trace_pb2.Span.SPAN_KIND_SERVER, "them=1")
    said = attributes(server)
    expected = {
        "rpc.system.name": "grpc", "rpc.response.status_code": "OK", "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "stageline", "gen_ai.request.model": "toy", "gen_ai.response.id": "mine",
        "gen_ai.usage.input_tokens": len(SECRET), "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"], "gen_ai.request.max_tokens": 5, "stageline.request.id": "mine",
    }  # fmt: skip
    assert {name: said.get(name) for name in expected} == expected
    assert set(by_name) == {"queue", "prefill", "decode", "stage 0-2", "stage 2-4"}
    for span in by_name.values():
        assert (span.trace_id, span.parent_span_id) == (server.trace_id, server.span_id)
        assert server.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server.end_time_unix_nano
    queue, prefill, decode = (by_name[name] for name in ("queue", "prefill", "decode"))
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    for layers in ("0-2", "2-4"):
        stage = attributes(by_name[f"stage {layers}"])
        assert stage["stageline.stage.layers"] == layers
        assert stage["stageline.stage.steps"] in (5, 6)  # the prompt in one chunk or two
        assert stage["stageline.stage.tokens"] == len(SECRET) + 4  # the last one chosen is not computed
        assert stage["stageline.stage.computing_s"] >= 5 * 0.002
        assert by_name[f"stage {layers}"].start_time_unix_nano >= prefill.start_time_unix_nano


async def test_http_goes_on_with_the_callers_trace_and_every_prompt_has_its_spans() -> None:
    async with traced() as (doors, spans):
        async with httpx.AsyncClient(base_url=doors.http) as client:
            body = {"prompt": [SECRET, SECRET + "!"], "max_tokens": 2}
            answer = await client.post("/v1/completions", json=body, headers={"traceparent": SAMPLED})
            assert answer.status_code == 200
            usage = answer.json()["usage"]
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.post("/v1/completions", json={**body, "n": 0})).status_code == 400
            assert (await client.get("/nowhere/at/all")).status_code == 404
        found = await spans()
    servers = [span for span in found if span.kind == trace_pb2.Span.SPAN_KIND_SERVER]
    good, bad, lost = servers
    assert (good.name, good.trace_id.hex(), good.parent_span_id.hex()) == ("POST /v1/completions", TRACE_ID, PARENT_ID)
    said = attributes(good)
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert (said["http.response.status_code"], said["gen_ai.operation.name"]) == (200, "text_completion")
    names = [span.name for span in found if span.parent_span_id == good.span_id]
    assert sorted(names) == sorted(2 * ["queue", "prefill", "decode", "stage 0-2", "stage 2-4"])
    assert (attributes(bad)["error.type"], attributes(bad)["http.response.status_code"]) == (
        "NUM_CHOICES_OUT_OF_RANGE",
        400,
    )
    assert bad.status.code == trace_pb2.Status.STATUS_CODE_UNSET, "the client's mistake"
    assert bad.trace_id != good.trace_id
    assert (lost.name, attributes(lost)["url.path"]) == ("GET", "/nowhere/at/all")


async def test_scores_refusals_and_cancelled_calls() -> None:
    async with traced() as (doors, spans):
        async with grpc.aio.insecure_channel(doors.grpc) as channel:
            stub = pb_grpc.InferenceServiceStub(channel)
            continuations = [scoring_pb2.Continuation(text="ab"), scoring_pb2.Continuation(text="cde")]
            await stub.Score(scoring_pb2.ScoreRequest(text=SECRET, continuations=continuations))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(pb.GenerateRequest(generation=generation(model="other")))
            long = generation()
            long.stop.max_tokens = 150
            call = stub.StreamGenerate(pb.StreamGenerateRequest(generation=long))
            await call.read()
            await call.read()
            call.cancel()
            await asyncio.sleep(0.1)
        found = await spans()
    score, refused, cancelled = (span for span in found if span.kind == trace_pb2.Span.SPAN_KIND_SERVER)
    assert attributes(score)["gen_ai.usage.input_tokens"] == len(SECRET) + 5
    assert {s.name for s in found if s.parent_span_id == score.span_id} == {
        "queue",
        "prefill",
        "stage 0-2",
        "stage 2-4",
    }
    assert attributes(refused)["error.type"] == "MODEL_NOT_FOUND"
    assert attributes(refused)["rpc.response.status_code"] == "NOT_FOUND"
    assert [span for span in found if span.parent_span_id == refused.span_id] == []
    assert attributes(cancelled)["error.type"] == "CANCELLED"
    assert "decode" in [span.name for span in found if span.parent_span_id == cancelled.span_id]


async def test_the_callers_decision_goes_before_the_ratio() -> None:
    async with traced(sample_ratio=0.0) as (doors, spans):
        async with httpx.AsyncClient(base_url=doors.http) as client:
            for headers in (
                {},
                {"traceparent": NOT_SAMPLED},
                {"traceparent": "00-zz-zz-01"},
                {"traceparent": SAMPLED},
            ):
                answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
                assert answer.status_code == 200
        found = await spans()
    assert {span.trace_id.hex() for span in found} == {TRACE_ID}
    assert sum(span.kind == trace_pb2.Span.SPAN_KIND_SERVER for span in found) == 1


async def test_calls_do_not_wait_for_a_collector_that_is_not_there() -> None:
    tracing = open_tracing(TracingSection(enabled=True, endpoint="http://127.0.0.1:9"))
    doors = Doors()
    doors.frontend.tracing = tracing
    async with open_doors(doors), httpx.AsyncClient(base_url=doors.http, timeout=5) as client:
        for _ in range(3):
            assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
    # Not stopped: it would try for seconds to send. Its thread is a daemon.


def test_off_imports_nothing_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(TracingSection()) is None
    check = "import sys, gateway.api.grpc.server, gateway.api.http.app; assert 'opentelemetry.sdk' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
    monkeypatch.delitem(sys.modules, "gateway.tracing.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match="stageline\\[tracing\\]"):
        open_tracing(TracingSection(enabled=True))


async def test_the_python_clients_pass_the_callers_trace_on() -> None:
    tracer = TracerProvider().get_tracer("caller")
    async with traced() as (doors, spans):
        with tracer.start_as_current_span("asynchronous") as outer:
            async with AsyncClient(doors.grpc) as client:
                assert [message async for message in client.stream_generate(generation())]
                await client.get_model()

        def call() -> trace.SpanContext:
            with tracer.start_as_current_span("blocking") as span, Client(doors.grpc) as client:
                client.generate(generation())
                return span.get_span_context()

        blocking = await asyncio.to_thread(call)
        async with AsyncClient(doors.grpc) as client:
            await client.generate(generation())
        found = await spans()
    servers = [span for span in found if span.name.endswith("/StreamGenerate")]
    parents = [(span.trace_id.hex(), span.parent_span_id.hex()) for span in servers]
    asynchronous = outer.get_span_context()
    assert parents[:2] == [(f"{one.trace_id:032x}", f"{one.span_id:016x}") for one in (asynchronous, blocking)]
    assert len(parents) == 3
    assert parents[2][1] == "", "without a span there is no parent"


def test_a_client_without_opentelemetry_does_not_import_it() -> None:
    script = "import sys; from stageline.client.connection import trace_context as t; assert t() == (); assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
