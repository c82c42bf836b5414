"""The gRPC door over real sockets."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from doors_helpers import Doors, failing, open_doors, until
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from gateway.api.grpc.server import MAX_MESSAGE_BYTES, SERVICE, serve_grpc
from stageline import errors
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc


@pytest.fixture
async def stub(doors):
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        yield pb_grpc.InferenceServiceStub(channel)


def generation(text="hi", **fields) -> gen.Generation:
    fields.setdefault("stop", gen.StopConditions(max_tokens=4))
    return gen.Generation(text=text, **fields)


async def failure(call) -> tuple[grpc.aio.AioRpcError, dict[type, object]]:
    """The error of a call, with its details by type."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = {}
    for box in rpc_status.from_call(caught.value).details:
        for kind in (
            error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo,
            error_details_pb2.RequestInfo,
        ):  # fmt: skip
            message = kind()
            if box.Unpack(message):
                details[kind] = message
    return caught.value, details


async def test_generate(stub, doors):
    response = await stub.Generate(pb.GenerateRequest(generation=generation(num_choices=2, request_id="r1")))
    assert response.start.request_id == "r1"
    assert (response.start.model, response.start.model_fingerprint) == ("tiny", "f00d")
    assert response.start.seed == doors.engine.requests[0].sampling.seed
    assert [choice.index for choice in response.choices] == [0, 1]
    assert [choice.text for choice in response.choices] == ["hé ", "hé "]
    assert list(response.choices[0].token_ids) == list(doors.tokenizer.encode("hé "))
    assert response.choices[0].finish_reason == gen.FINISH_REASON_LENGTH
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (2, 8)


async def test_stream_has_start_deltas_usage(stub):
    request = pb.StreamGenerateRequest(generation=generation(output=gen.OutputOptions(num_logprobs=2)))
    messages = [message async for message in stub.StreamGenerate(request)]
    assert [m.HasField("start") for m in messages] == [True] + [False] * 5
    assert [m.HasField("usage") for m in messages] == [False] * 5 + [True]
    assert [m.choices[0].text for m in messages[1:-1]] == ["h", "", "é", " "]
    logprobs = messages[1].choices[0].logprobs[0]
    assert (logprobs.chosen.token, logprobs.chosen.logprob, len(logprobs.top)) == (b"h", -0.5, 2)


async def test_cached_prompt_tokens_are_those_that_no_choice_computed(stub, doors):
    doors.engine.cached_prompt_tokens = (2, 1)
    response = await stub.Generate(pb.GenerateRequest(generation=generation(num_choices=2)))
    assert response.usage.cached_prompt_tokens == 1
    messages = [m async for m in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation()))]
    assert messages[-1].usage.cached_prompt_tokens == 2


async def test_resume_goes_on_after_what_the_client_has(stub, doors):
    resume = gen.Resume(token_ids=doors.tokenizer.encode("h"), model_fingerprint="f00d", seed=5, choice_index=3)
    response = await stub.Generate(pb.GenerateRequest(generation=generation(resume=resume)))
    assert (response.choices[0].index, response.choices[0].text, response.start.seed) == (3, "é ", 5)
    assert response.usage.completion_tokens == 4


async def test_resume_of_another_model(stub):
    resume = gen.Resume(token_ids=[1], model_fingerprint="beef", seed=5)
    error, details = await failure(stub.Generate(pb.GenerateRequest(generation=generation(resume=resume))))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert details[error_details_pb2.ErrorInfo].reason == "MODEL_FINGERPRINT_MISMATCH"


async def test_conversation_tokenize_detokenize(stub, doors):
    conversation = gen.Conversation(messages=[gen.Message(role="user", content="yo")])
    tokens = await stub.Tokenize(pb.TokenizeRequest(conversation=conversation))
    assert tokens.text == "<|im_start|>user\nyo<|im_end|>\n<|im_start|>assistant\n"
    await stub.Generate(pb.GenerateRequest(generation=gen.Generation(conversation=conversation)))
    assert list(doors.engine.requests[0].prompt_token_ids) == list(tokens.token_ids)
    # Without max_tokens the answer may take what is left of the context.
    assert doors.engine.requests[0].sampling.max_tokens == 512 - len(tokens.token_ids)
    text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == "user\nyo\nassistant\n"
    text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids, skip_special_tokens=False))
    assert text.text == tokens.text
    _, details = await failure(stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 260])))
    assert details[error_details_pb2.ErrorInfo].metadata["field"] == "token_ids[1]"


async def test_get_model(stub):
    model = await stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.max_context_tokens, model.vocab_size, model.has_chat_template) == ("tiny", 512, 260, True)
    assert list(model.eos_token_ids) == [257]
    assert [(s.index, s.replicas[0].pid) for s in model.pipelines[0].stages] == [(0, 7), (1, 7)]
    assert model.spares[0].address == "127.0.0.1:1"


async def test_bad_field_is_named_by_its_path(stub):
    request = pb.GenerateRequest(generation=generation(sampling=gen.SamplingParams(top_p=0)))
    error, details = await failure(stub.Generate(request))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    info = details[error_details_pb2.ErrorInfo]
    assert (info.reason, info.domain, info.metadata["value"]) == ("TOP_P_OUT_OF_RANGE", "stageline.dev", "0.0")
    violation = details[error_details_pb2.BadRequest].field_violations[0]
    assert violation.field == "generation.sampling.top_p"
    assert violation.description == error.details()


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", "PROMPT_EMPTY"),
        ({"model": "other"}, "NOT_FOUND", "MODEL_NOT_FOUND"),
        ({"priority": 101}, "INVALID_ARGUMENT", "PRIORITY_OUT_OF_RANGE"),
        ({"output": gen.OutputOptions(num_prompt_logprobs=21)}, "INVALID_ARGUMENT", "NUM_PROMPT_LOGPROBS_OUT_OF_RANGE"),
        ({"text": "x" * 512}, "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"),
        ({"request_id": "x" * 129}, "INVALID_ARGUMENT", "REQUEST_ID_INVALID"),
    ],
)
async def test_refusals(stub, fields, code, reason):
    error, details = await failure(stub.Generate(pb.GenerateRequest(generation=generation(**fields))))
    assert (error.code().name, details[error_details_pb2.ErrorInfo].reason) == (code, reason)


async def test_no_prompt_and_bytes_that_are_no_message(doors, stub):
    error, details = await failure(stub.Generate(pb.GenerateRequest()))
    assert details[error_details_pb2.ErrorInfo].reason == "PROMPT_MISSING"
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        raw = channel.unary_unary(f"/{SERVICE}/Generate")
        not_utf8 = b"\x0a\x04\x12\x02\xff\xfe"  # generation.text = ff fe
        for data in (not_utf8, b"\xff\xff\xff"):
            error, details = await failure(raw(data))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert details[error_details_pb2.ErrorInfo].reason == "REQUEST_MALFORMED"


async def test_no_chat_template():
    async with open_doors(Doors(template=None)) as doors, grpc.aio.insecure_channel(doors.grpc) as channel:
        conversation = gen.Conversation(messages=[gen.Message(role="user", content="yo")])
        call = pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(conversation=conversation))
        _, details = await failure(call)
        assert details[error_details_pb2.ErrorInfo].reason == "NO_CHAT_TEMPLATE"


async def test_full_queue_says_when_to_retry(stub, doors):
    failing(errors.ResourceExhaustedError("QUEUE_FULL", "full", retry_after_s=1.5), 0)(doors.engine)
    error, details = await failure(stub.Generate(pb.GenerateRequest(generation=generation())))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details[error_details_pb2.RetryInfo].retry_delay == duration_pb2.Duration(seconds=1, nanos=500_000_000)


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (errors.UnavailableError("PIPELINE_LOST", "lost"), "UNAVAILABLE", "PIPELINE_LOST"),
        (ZeroDivisionError("secret"), "INTERNAL", "INTERNAL"),
    ],
)
async def test_error_in_the_middle_of_a_stream(stub, doors, raised, code, reason):
    failing(raised, 2)(doors.engine)
    received = []

    async def read():
        async for message in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation())):
            received.append(message)

    error, details = await failure(read())
    assert len(received) == 3  # start and two deltas
    assert (error.code().name, details[error_details_pb2.ErrorInfo].reason) == (code, reason)
    assert "secret" not in error.details()


async def test_deadline_reaches_the_engine(stub, doors):
    doors.engine.token_s = 0.05
    before = time.monotonic()
    request = pb.GenerateRequest(generation=generation(stop=gen.StopConditions(max_tokens=400)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request, timeout=0.3)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert before < doors.engine.requests[0].deadline_s < before + 0.4
    await stub.Generate(pb.GenerateRequest(generation=generation()))
    assert doors.engine.requests[1].deadline_s is None


@pytest.mark.parametrize("token_s", [0.01, 30.0])
async def test_cancellation_closes_the_engines_generator(stub, doors, token_s):
    doors.engine.token_s = token_s
    stop = gen.StopConditions(max_tokens=500)
    call = stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation(stop=stop, request_id="gone")))
    assert (await call.read()).HasField("start")
    await until(lambda: doors.engine.requests)
    call.cancel()
    await doors.until_cancelled()
    assert doors.engine.cancelled == ["gone"]


async def test_health_follows_the_engine(doors):
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status == serving
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == serving
        for ready, expected in ((False, not_serving), (True, serving)):
            doors.engine.is_ready = ready
            assert (await asyncio.wait_for(watch.read(), 5)).status == expected
        watch.cancel()


async def test_not_serving_until_ready():
    doors = Doors()
    doors.engine.is_ready = False
    async with open_doors(doors), grpc.aio.insecure_channel(doors.grpc) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services(doors):
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


async def test_message_over_the_limit(stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text="x" * (MAX_MESSAGE_BYTES + 1)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_port_in_use(doors):
    host, port = doors.grpc.split(":")
    with pytest.raises(errors.ConfigError) as caught:
        await serve_grpc(doors.frontend, host, int(port))
    assert caught.value.reason == "PORT_IN_USE"
    assert port in caught.value.message
