"""Features of the gRPC door: names of requests, tools, constraints, echo, best_of, compression, rich errors."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from doors_helpers import failing
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from test_doors_grpc import failure, generation
from test_doors_http_features import FUNCTION, SAYS, allowed

from stageline import errors
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc

TOOL = gen.Tool(
    name="weather", description="Weather of a city", parameters_json_schema=json.dumps(FUNCTION["parameters"])
)


@pytest.fixture
async def stub(doors):
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        yield pb_grpc.InferenceServiceStub(channel)


def conversation(**fields) -> gen.Generation:
    talk = gen.Conversation(messages=[gen.Message(role="user", content="?")], **fields)
    return gen.Generation(conversation=talk, stop=gen.StopConditions(max_tokens=4))


async def test_a_name_goes_in_and_out(stub, doors):
    call = stub.Generate(pb.GenerateRequest(generation=generation()), metadata=(("x-request-id", "order-66"),))
    assert (await call).start.request_id == "order-66"
    assert dict(await call.initial_metadata())["x-request-id"] == "order-66"
    assert doors.engine.requests[0].request_id == "order-66"
    # The request's own field goes first; without either, one is drawn.
    request = pb.StreamGenerateRequest(generation=generation(request_id="mine"))
    stream = stub.StreamGenerate(request, metadata=(("x-request-id", "other"),))
    assert dict(await stream.initial_metadata())["x-request-id"] == "mine"
    assert (await stream.read()).start.request_id == "mine"
    call = stub.GetModel(pb.GetModelRequest())
    assert len(dict(await call.initial_metadata())["x-request-id"]) == 32


async def test_errors_carry_the_name(stub, doors):
    failing(errors.UnavailableError("NO_PIPELINE", "none"), 0)(doors.engine)
    call = stub.Generate(pb.GenerateRequest(generation=generation(request_id="r9")))
    error, details = await failure(call)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert details[error_details_pb2.RequestInfo].request_id == "r9"
    assert details[error_details_pb2.RetryInfo].retry_delay.seconds == 1
    assert dict(await call.initial_metadata())["x-request-id"] == "r9"


async def test_echo_and_best_of(stub, doors):
    doors.engine.logprobs = (-3.0, -1.0, -2.0)
    options = gen.OutputOptions(echo_prompt=True)
    response = await stub.Generate(pb.GenerateRequest(generation=generation(best_of=3, num_choices=2, output=options)))
    assert [choice.text for choice in response.choices] == ["hihé ", "hihé "]
    assert [choice.index for choice in response.choices] == [0, 1]
    assert response.usage.completion_tokens == 12
    _, details = await failure(stub.Generate(pb.GenerateRequest(generation=generation(best_of=1, num_choices=2))))
    assert details[error_details_pb2.BadRequest].field_violations[0].field == "generation.best_of"
    with pytest.raises(grpc.aio.AioRpcError, match="cannot be streamed"):
        await stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation(best_of=2))).read()


@pytest.mark.parametrize(
    ("mode", "name", "first"),
    [
        (gen.TOOL_CHOICE_MODE_UNSPECIFIED, "", None),
        (gen.TOOL_CHOICE_MODE_AUTO, "", None),
        (gen.TOOL_CHOICE_MODE_REQUIRED, "", {"<"}),
        (gen.TOOL_CHOICE_MODE_FUNCTION, "weather", {"<"}),
    ],
)
async def test_tool_calls(stub, doors, mode, name, first):
    request = conversation(tools=[TOOL], tool_choice=gen.ToolChoice(mode=mode, function_name=name))
    request.stop.max_tokens = doors.says(SAYS)
    response = await stub.Generate(pb.GenerateRequest(generation=request))
    [choice] = response.choices
    [call] = choice.tool_calls
    assert (choice.text, choice.finish_reason) == ("I look.", gen.FINISH_REASON_TOOL_CALLS)
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    grammar = doors.engine.requests[0].grammar
    assert (None if grammar is None else allowed(await grammar.start().ready, doors)) == first

    arguments = ""
    async for message in stub.StreamGenerate(pb.StreamGenerateRequest(generation=request)):
        for delta in message.choices:
            arguments += "".join(call.arguments for call in delta.tool_calls)
    assert json.loads(arguments) == {"city": "Paris"}


async def test_calls_and_results_go_back(stub, doors):
    talk = gen.Conversation(
        tools=[TOOL],
        messages=[
            gen.Message(role="user", content="?"),
            gen.Message(role="assistant", tool_calls=[gen.ToolCall(id="c", name="weather", arguments='{"city": "P"}')]),
            gen.Message(role="tool", content="sunny", tool_call_id="c"),
        ],
    )
    answer = await stub.Tokenize(pb.TokenizeRequest(conversation=talk, return_token_bytes=True))
    assert '{"name": "weather", "arguments": {"city": "P"}}' in answer.text
    assert b"".join(answer.token_bytes).decode() == answer.text
    talk.messages[1].tool_calls[0].arguments = "["
    _, details = await failure(stub.Tokenize(pb.TokenizeRequest(conversation=talk)))
    field = details[error_details_pb2.BadRequest].field_violations[0].field
    assert field == "conversation.messages[1].tool_calls[0].arguments"


@pytest.mark.parametrize(
    ("talk", "field"),
    [
        ({"tools": [gen.Tool(name="a b")]}, "tools[0].name"),
        ({"tools": [gen.Tool(name="a", parameters_json_schema="[]")]}, "tools[0].parameters_json_schema"),
        ({"tool_choice": gen.ToolChoice(mode=gen.TOOL_CHOICE_MODE_REQUIRED)}, "tool_choice"),
        ({"tool_choice": gen.ToolChoice(mode=9)}, "tool_choice.mode"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_conversations_that_are_refused(stub, talk, field):
    _, details = await failure(stub.Generate(pb.GenerateRequest(generation=conversation(**talk))))
    assert details[error_details_pb2.BadRequest].field_violations[0].field == f"generation.conversation.{field}"


@pytest.mark.parametrize(
    ("constraint", "first"),
    [
        (gen.Constraint(json_schema='{"type": "boolean"}'), "tf"),
        (gen.Constraint(json_object=True), "{"),
        (gen.Constraint(regex="[ab]"), "ab"),
        (gen.Constraint(grammar='start: "x" | "y"'), "xy"),
        (gen.Constraint(choice=gen.TextChoices(texts=["yes", "no"])), "yn"),
    ],
)
async def test_constraints(stub, doors, constraint, first):
    await stub.Generate(pb.GenerateRequest(generation=generation(constraint=constraint)))
    assert allowed(await doors.engine.requests[0].grammar.start().ready, doors) == set(first)


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (gen.Constraint(), "generation.constraint"),
        (gen.Constraint(json_object=False), "generation.constraint"),
        (gen.Constraint(regex="("), "generation.constraint.regex"),
        (gen.Constraint(regex=""), "generation.constraint.regex"),
        (gen.Constraint(json_schema="{"), "generation.constraint.json_schema"),
        (gen.Constraint(choice=gen.TextChoices()), "generation.constraint.choice"),
    ],
)
async def test_constraints_that_are_refused(stub, constraint, field):
    error, details = await failure(stub.Generate(pb.GenerateRequest(generation=generation(constraint=constraint))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details[error_details_pb2.BadRequest].field_violations[0].field == field


async def test_long_answers_are_compressed_and_compressed_requests_are_read(doors):
    """Through a proxy that counts what comes back."""
    host, port = doors.grpc.split(":")
    received = 0

    async def pipe(reader, writer, counts: bool) -> None:
        nonlocal received
        while data := await reader.read(65536):
            received += len(data) if counts else 0
            writer.write(data)
        writer.close()

    async def connect(reader, writer) -> None:
        back_reader, back_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pipe(reader, back_writer, False), pipe(back_reader, writer, True))

    proxy = await asyncio.start_server(connect, "127.0.0.1", 0)
    address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    text = "the same again and again " * 8000
    async with grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        answer = await pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(text=text))
    proxy.close()
    assert answer.text == text
    assert received < answer.ByteSize() / 10


async def test_reflection_knows_every_service_and_message(doors):
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**fields):
            stream = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**fields)]))
            return await stream.read()

        services = {service.name for service in (await ask(list_services="")).list_services_response.service}
        assert services == {
            "stageline.inference.v1.InferenceService", "stageline.operations.v1.OperationsService",
            "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",
        }  # fmt: skip
        for symbol in ("Constraint", "ToolCallDelta", "InferenceService"):
            answer = await ask(file_containing_symbol=f"stageline.inference.v1.{symbol}")
            assert answer.file_descriptor_response.file_descriptor_proto


async def test_get_model_says_what_a_client_needs_to_render(stub, doors):
    model = await stub.GetModel(pb.GetModelRequest())
    assert model.takes_tools
    assert dict(model.special_tokens) == dict(doors.tokenizer.special_tokens)
