"""Features of the HTTP door beside plain generation: names of requests, echo, best_of, tools, the tokenizer's paths."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import httpx
import openai
import pytest
from doors_helpers import MODEL, Doors, failing, open_doors

from stageline import errors

FUNCTION = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
SAYS = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
USER = [{"role": "user", "content": "?"}]


async def test_a_request_keeps_the_name_it_came_with(web, doors, caplog):
    caplog.set_level(logging.INFO, logger="stageline.gateway.requests")
    headers = {"x-request-id": "order-66"}
    answer = await web.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers)
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("order-66", "cmpl-order-66")
    assert doors.engine.requests[0].request_id == "order-66"
    assert "request order-66: done, 1 prompt tokens, 2 generated" in caplog.text
    await web.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2}, headers=headers)
    assert {request.request_id for request in doors.engine.requests[1:]} == {"order-66-0", "order-66-1"}


async def test_requests_without_a_name_get_one(web, client, doors):
    first, second = [await web.get(path) for path in ("/v1/models", "/v1/nothing")]
    assert re.fullmatch("[0-9a-f]{32}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    answer = await client.completions.create(model="tiny", prompt="a")
    assert answer.id == f"cmpl-{answer._request_id}" == f"cmpl-{doors.engine.requests[0].request_id}"


async def test_errors_have_the_name_in_header_message_and_log(web, client, doors, caplog):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="", extra_headers={"x-request-id": "bad"})
    assert caught.value.request_id == "bad"
    failing(ZeroDivisionError("secret"), 0)(doors.engine)
    answer = await web.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "r9"})
    assert answer.headers["x-request-id"] == "r9"
    assert "under request r9" in answer.json()["error"]["message"]
    assert "request r9: POST /v1/completions failed" in caplog.text


async def test_a_failure_of_ours_before_the_engine_is_a_named_500_that_is_audited(web, doors, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="stageline.audit")

    async def broken(*_, **__):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(doors.frontend, "accept", broken)
    for _ in range(2):  # on one connection
        answer = await web.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "r9"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "r9")
        assert "under request r9" in answer.json()["error"]["message"]
        assert "secret" not in answer.text
    line = json.loads(next(one.message for one in caplog.records if one.name == "stageline.audit"))
    assert (line["request_id"], line["status"], line["reason"]) == ("r9", "500", "INTERNAL")


@pytest.mark.parametrize("name", ["x" * 129, "a b", "é", ""])
async def test_a_name_that_fits_no_log_line_is_refused(web, name):
    answer = await web.get("/v1/models", headers={"x-request-id": name.encode()})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_every_answer(client, stream):
    answer = await client.completions.create(
        model="tiny", prompt=["ab", "c"], max_tokens=3, echo=True, n=2, stream=stream
    )
    if not stream:
        assert [choice.text for choice in answer.choices] == ["abhé", "abhé", "ché", "ché"]
        return
    texts = dict.fromkeys(range(4), "")
    async for chunk in answer:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "abhé", 1: "abhé", 2: "ché", 3: "ché"}


async def test_echo_of_token_ids_shows_special_tokens(client):
    answer = await client.completions.create(model="tiny", prompt=[256, 71], max_tokens=1, echo=True)
    assert answer.choices[0].text.startswith("<|im_start|>")


async def test_best_of_returns_the_most_probable(client, doors):
    doors.engine.logprobs = (-3.0, -1.0, -2.0)
    answer = await client.completions.create(model="tiny", prompt="a", max_tokens=2, best_of=3, n=2, logprobs=0)
    assert [choice.logprobs.token_logprobs for choice in answer.choices] == [[-1.0, -1.0], [-2.0, -2.0]]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 6  # all that was generated
    answer = await client.completions.create(model="tiny", prompt="a", max_tokens=2, best_of=3)
    assert len(answer.choices) == 1
    assert answer.choices[0].logprobs is None
    assert doors.engine.requests[1].num_choices == 3


async def test_stream_counts_usage_in_every_chunk_where_asked(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.completions.create(
        model="tiny", prompt="a", max_tokens=3, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 3)


async def test_a_tool_call(client, doors):
    answer = await client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, max_tokens=doors.says(SAYS))
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function", "weather", {"city": "Paris"},
    )  # fmt: skip
    assert call.id.startswith("call_")
    prompt = doors.tokenizer.decode(doors.engine.requests[0].prompt_token_ids)
    assert json.loads(prompt[: prompt.index("user\n")]) == TOOLS[0]

    # The call and its result go back in the next turn.
    messages = [*USER, choice.message, {"role": "tool", "content": "sunny", "tool_call_id": call.id}]
    await client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=2)
    prompt = doors.tokenizer.decode(doors.engine.requests[1].prompt_token_ids)
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in prompt
    assert "tool\nsunny" in prompt


async def test_a_streamed_tool_call_is_the_same(client, doors):
    stream = await client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, max_tokens=doors.says(SAYS), stream=True
    )
    content, name, arguments, ids, reason, pieces = "", "", "", [], None, 0
    async for chunk in stream:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            ids += [call.id] if call.id else []
            name += call.function.name or ""
            arguments += call.function.arguments
            pieces += 1
    assert (content, name, json.loads(arguments), reason) == ("I look.", "weather", {"city": "Paris"}, "tool_calls")
    assert len(ids) == 1
    assert pieces > 5


async def test_streamed_calls_through_the_clients_own_accumulator(client, doors):
    manager = client.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS, max_tokens=doors.says(SAYS))
    async with manager as stream:
        final = await stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})


async def test_tool_choice_none_and_one_call_at_a_time(client, doors):
    answer = await client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, tool_choice="none", max_tokens=doors.says(SAYS)
    )
    assert answer.choices[0].message.content == SAYS
    assert "weather" not in doors.tokenizer.decode(doors.engine.requests[0].prompt_token_ids)
    await client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, parallel_tool_calls=False, max_tokens=2
    )
    assert doors.engine.requests[1].sampling.stop_strings == ("</tool_call>",)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_forced_call_has_a_grammar(client, doors, choice):
    answer = await client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, tool_choice=choice, max_tokens=doors.says(SAYS.removeprefix("I look.\n"))
    )  # fmt: skip
    assert answer.choices[0].message.content is None
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    masks = doors.engine.requests[0].grammar.start()
    assert allowed(await masks.ready, doors) == {"<"}


async def test_tools_that_cannot_be_used(client, doors):
    async def refused(**fields):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=USER, **fields)
        return caught.value.code, caught.value.param

    other = {"type": "function", "function": {"name": "other"}}
    assert await refused(tools=TOOLS, tool_choice=other) == ("tool_unknown", "tool_choice")
    broken = [{"type": "function", "function": {**FUNCTION, "parameters": {"type": "nothing"}}}]
    assert await refused(tools=broken, tool_choice="required") == ("grammar_invalid", "tools")
    form = {"type": "json_object"}
    assert await refused(tools=TOOLS, tool_choice="required", response_format=form) == ("grammar_twice", "tool_choice")
    bad = [
        *USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}],
        },
    ]
    with pytest.raises(openai.BadRequestError, match="JSON object"):
        await client.chat.completions.create(model="tiny", messages=bad)
    async with open_doors(Doors(template="{{ messages[0].content }}")) as plain, httpx.AsyncClient() as web:
        answer = await web.post(f"{plain.http}/v1/chat/completions", json={"messages": USER, "tools": TOOLS})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "tools_not_in_template")


async def test_continue_final_message(client, doors):
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=2, extra_body={"continue_final_message": True}
    )
    prompt = doors.tokenizer.decode(doors.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nWell, ")
    await client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=2, extra_body={"add_generation_prompt": False}
    )
    prompt = doors.tokenizer.decode(doors.engine.requests[1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("?<|im_end|>\n")


async def test_tokenizer_paths(web, doors):
    answer = (await web.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
    ids = list(doors.tokenizer.encode("hé"))
    assert answer == {"count": 3, "max_model_len": 512, "tokens": ids, "token_strs": ["h", "\ufffd", "\ufffd"]}
    chat = (await web.post("/tokenize", json={"messages": USER, "tools": TOOLS})).json()
    text = (await web.post("/detokenize", json={"tokens": chat["tokens"]})).json()["prompt"]
    assert text.endswith("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith('{"type": "function"')
    assert chat["token_strs"] is None
    wrong = await web.post("/detokenize", json={"tokens": [1, 260]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens[1]")
    wrong = await web.post("/tokenize", json={"prompt": "a", "model": "other"})
    assert wrong.status_code == 404
    wrong = await web.post("/tokenize", json={"text": "a"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "text.prompt")
    info = (await web.get("/tokenizer_info")).json()
    assert info["model_max_length"] == 512
    assert info.keys() >= {"tokenizer_class", "chat_template", "add_bos_token", "vocab_size"}


async def test_one_model_by_name(client):
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("body", "first"),
    [
        ({"response_format": {"type": "json_object"}}, "{"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}},
            "tf",
        ),
        ({"guided_json": {"type": "boolean"}}, "tf"),
        ({"guided_json": '{"type": "boolean"}'}, "tf"),
        ({"guided_regex": "[ab]x"}, "ab"),
        ({"guided_choice": ["yes", "no"]}, "yn"),
        ({"guided_grammar": 'start: "x" | "y"'}, "xy"),
        ({"guided_grammar": 'root ::= "x" | "y" root'}, "xy"),
        ({"structured_outputs": {"regex": "z+"}}, "z"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "n"),
        ({"structured_outputs": {"choice": ["q"]}}, "q"),
        ({"structured_outputs": {"grammar": 'start: "w"'}}, "w"),
        ({"structured_outputs": {"json_object": True}}, "{"),
        ({"response_format": {"type": "text"}}, None),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_every_spelling_of_a_constraint(web, doors, body, first, path):
    prompt = {"prompt": "a"} if path == "completions" else {"messages": USER}
    answer = await web.post(f"/v1/{path}", json={**prompt, **body, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    grammar = doors.engine.requests[0].grammar
    if first is None:
        assert grammar is None
    else:
        assert allowed(await grammar.start().ready, doors) == set(first)


def allowed(mask: bytes, doors: Doors) -> set[str]:
    bits = int.from_bytes(mask, "little")
    ids = [i for i in range(256) if bits >> i & 1]
    return {doors.tokenizer.decode([i]) for i in ids}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"guided_regex": "("}, "guided_regex", "grammar_invalid"),
        ({"guided_regex": ""}, "guided_regex", "grammar_size_out_of_range"),
        ({"guided_json": {"type": "nothing"}}, "guided_json", "grammar_invalid"),
        ({"guided_json": "{"}, "guided_json", "grammar_invalid"),
        ({"guided_grammar": "\n" * 65000}, "guided_grammar", "grammar_invalid"),  # at once, not after a minute
        ({"guided_grammar": 'root ::= start\nstart ::= "s"'}, "guided_grammar", "grammar_invalid"),  # root is start
        ({"guided_grammar": "0"}, "guided_grammar", "grammar_invalid"),
        ({"guided_grammar": 'root ::= ("a"'}, "guided_grammar", "grammar_invalid"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", "grammar_invalid"),
        ({"guided_grammar": "x" * 65537}, "guided_grammar", "grammar_size_out_of_range"),
        ({"guided_choice": []}, "guided_choice", "choices_invalid"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "choices_invalid"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "grammar_twice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "parameter_missing"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "ignore_eos_with_grammar"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag", "parameter_not_served"),
    ],
)
async def test_constraints_that_are_refused(web, doors, body, param, code):
    answer = await web.post("/v1/completions", json={"prompt": "a", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert not doors.engine.requests


async def test_no_end_token_no_grammar():
    async with open_doors(Doors(model=replace(MODEL, eos_token_ids=()))) as doors, httpx.AsyncClient() as web:
        answer = await web.post(f"{doors.http}/v1/completions", json={"prompt": "a", "guided_regex": "a"})
        assert answer.json()["error"]["code"] == "no_end_token"


async def test_unavailable_says_when_to_retry(web, doors):
    failing(errors.UnavailableError("NO_PIPELINE", "none"), 0)(doors.engine)
    answer = await web.post("/v1/completions", json={"prompt": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_allow_names_every_method_of_a_path(web):
    for path, allowed in (("/v1/files", "GET, POST"), ("/v1/files/x", "DELETE, GET"), ("/v1/completions", "POST")):
        answer = await web.request("OPTIONS", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


async def test_the_document_knows_what_is_not_served_and_where_a_key_goes(web):
    document = (await web.get("/openapi.json")).json()
    body = document["components"]["schemas"]["CompletionBody"]
    assert body["additionalProperties"] is False
    assert body["properties"]["suffix"]["enum"] == ["", None]
    assert body["properties"]["model"]["enum"] == ["tiny", None]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            named = {one["name"] for one in operation["parameters"] if one["in"] == "header"}
            assert "x-request-id" in named
            assert ("x-request-timeout-s" in named) == path.endswith("completions")
            assert bool(operation["security"]) == (path not in ("/healthz", "/readyz"))
            assert {"400", "500"} <= set(operation["responses"])
