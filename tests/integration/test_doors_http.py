"""The HTTP door over real sockets, with the `openai` client where it can say it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import httpx
import openai
import pytest
from doors_helpers import Doors, failing, open_doors, until
from prometheus_client.parser import text_string_to_metric_families

from gateway.api.http.app import MAX_BODY_BYTES
from stageline import errors


def events(text: str) -> list[str]:
    """Data of the server-sent events."""
    assert all(block.startswith("data: ") for block in text.split("\n\n") if block)
    return [block.removeprefix("data: ") for block in text.split("\n\n") if block]


async def test_who_will_be_refused_is_refused_before_anything_is_computed(web, doors):
    doors.engine.full = errors.ResourceExhaustedError("QUEUE_FULL", "full", retry_after_s=2.5)
    answer = await web.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 100_000, "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["code"] == "queue_full"
    assert doors.engine.requests == []


async def test_metrics_are_prometheus_text(web, doors):
    doors.engine.metrics.rejected("QUEUE_FULL")
    answer = await web.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    (sample,) = (s for s in families["stageline:requests_rejected"].samples if s.name.endswith("_total"))
    assert (sample.labels, sample.value) == ({"model_name": "tiny", "reason": "QUEUE_FULL"}, 1)


async def test_every_call_is_measured_under_its_operation(web, client, doors):
    messages = [{"role": "user", "content": "x"}]
    for _ in range(2):
        await client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=4)
    stream = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, stream=True)
    assert [chunk async for chunk in stream]
    doors.engine.failure, doors.engine.fail_after = errors.UnavailableError("GATEWAY_STOPPING", "it stops"), 1
    assert (await web.post("/v1/completions", json={"model": "tiny", "prompt": "a"})).status_code == 503
    found = text_string_to_metric_families((await web.get("/metrics")).text)
    told = {
        (s.name.removeprefix("gen_ai_"), s.labels["gen_ai_operation_name"], s.labels.get("error_type", "")): s.value
        for family in found if family.name.startswith("gen_ai_") for s in family.samples if "le" not in s.labels
        and s.labels.get("gen_ai_token_type") != "input"
    }  # fmt: skip
    duration, ttft = "server_request_duration_seconds_count", "server_time_to_first_token_seconds_count"
    assert {key: value for key, value in told.items() if key[0] == duration} == {
        (duration, "chat", ""): 2,
        (duration, "text_completion", ""): 2,
        (duration, "text_completion", "GATEWAY_STOPPING"): 1,
    }
    assert (told[ttft, "chat", ""], told[ttft, "text_completion", ""]) == (2, 2)
    usage = "client_token_usage_sum"
    assert (told[usage, "chat", ""], told[usage, "text_completion", ""]) == (2 * 4, 2 * 3 + 1)


async def test_models_and_probes(client, web, doors):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await web.get("/healthz")).status_code == 200
    assert (await web.get("/readyz")).status_code == 200
    doors.engine.is_ready = False
    assert (await web.get("/readyz")).status_code == 503
    assert (await web.get("/healthz")).status_code == 200


async def test_chat(client, doors):
    messages = [{"role": "user", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]}]
    answer = await client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=4, n=2, logprobs=True, top_logprobs=2, seed=9, user="me"
    )
    assert [choice.message.content for choice in answer.choices] == ["hé ", "hé "]
    assert (answer.choices[1].index, answer.choices[1].finish_reason) == (1, "length")
    entry = answer.choices[0].logprobs.content[0]
    assert (entry.token, entry.bytes, entry.logprob) == ("h", [104], -0.5)
    assert [top.logprob for top in entry.top_logprobs] == [-1.0, -2.0]
    assert (answer.system_fingerprint, answer.model_extra["seed"]) == ("f00d", 9)
    request = doors.engine.requests[0]
    text = "<|im_start|>user\nyo<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_token_ids == doors.tokenizer.encode(text)
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": 8,
        "total_tokens": len(request.prompt_token_ids) + 8,
    }


async def test_an_answer_can_be_sent_back_in_the_next_turn(client, doors):
    first = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2
    )
    messages = [{"role": "user", "content": "a"}, first.choices[0].message, {"role": "user", "content": "b"}]
    await client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert len(doors.engine.requests) == 2


async def test_chat_stream(client):
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=6, stream=True, n=2,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "hé ll", 1: "hé ll"}
    assert reasons == {0: "length", 1: "length"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)


async def test_cached_prompt_tokens_are_those_that_no_choice_computed(client, doors):
    doors.engine.cached_prompt_tokens = (1, 2)
    answer = await client.completions.create(model="tiny", prompt=["abcd", "abcd"], n=2, max_tokens=3)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    stream = await client.completions.create(
        model="tiny", prompt="abcd", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage async for chunk in stream][-1]
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (4, 1)


async def test_completion_of_lists(client, doors):
    answer = await client.completions.create(model="tiny", prompt=["ab", "c"], n=2, seed=5, max_tokens=3)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, "hé") for i in range(4)]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 12
    assert sorted(request.sampling.seed for request in doors.engine.requests) == [5, 6]
    answer = await client.completions.create(model="tiny", prompt=[[1, 2], [3]])
    drawn = answer.model_extra["seed"]
    assert sorted(request.sampling.seed for request in doors.engine.requests[2:]) == [drawn, drawn + 1]
    assert {request.prompt_token_ids for request in doors.engine.requests[2:]} == {(1, 2), (3,)}
    assert all(request.sampling.max_tokens == 16 for request in doors.engine.requests[2:])
    await client.completions.create(model="tiny", prompt=[7, 8])
    assert doors.engine.requests[4].prompt_token_ids == (7, 8)


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(client, stream):
    answer = await client.completions.create(model="tiny", prompt="a", max_tokens=4, logprobs=1, stream=stream)
    parts = [chunk async for chunk in answer] if stream else [answer]
    logprobs = [part.choices[0].logprobs for part in parts]
    assert [token for entry in logprobs for token in entry.tokens] == ["h", "bytes:\\xc3", "bytes:\\xa9", " "]
    assert [offset for entry in logprobs for offset in entry.text_offset] == [0, 1, 1, 2]
    assert [value for entry in logprobs for value in entry.token_logprobs] == [-0.5] * 4
    assert all(len(top) == 2 for entry in logprobs for top in entry.top_logprobs)  # asked for one; the chosen is added
    assert "".join(part.choices[0].text for part in parts) == "hé "


def test_sync_client():
    async def serve(ready, done):
        async with open_doors(Doors()) as doors:
            ready.set_result(doors.http)
            await done.wait()

    async def main():
        ready, done = asyncio.get_running_loop().create_future(), asyncio.Event()
        task = asyncio.create_task(serve(ready, done))
        base = await ready

        def use():
            with openai.OpenAI(base_url=f"{base}/v1", api_key="none") as client:
                whole = client.completions.create(model="tiny", prompt="a", max_tokens=4).choices[0].text
                with client.completions.create(model="tiny", prompt="a", max_tokens=4, stream=True) as stream:
                    return whole, "".join(chunk.choices[0].text for chunk in stream)

        assert await asyncio.to_thread(use) == ("hé ", "hé ")
        done.set()
        await task

    asyncio.run(main())


async def test_extra_sampling_fields_reach_the_engine(client, doors):
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 2,
        "stop_token_ids": [65], "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    await client.completions.create(
        model="tiny", prompt="a", temperature=0.5, top_p=0.9, stop=["x", "y"], logit_bias={"65": -100},
        frequency_penalty=0.25, presence_penalty=-1, max_tokens=3, extra_body=extra,
    )  # fmt: skip
    params = doors.engine.requests[0].sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == pytest.approx((0.5, 0.9, 5, 0.1))
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == pytest.approx(
        (1.2, 0.25, -1)
    )
    assert (params.eos_token_ids, params.min_tokens, params.stop_token_ids) == ((), 2, (65,))
    assert (params.skip_special_tokens, params.include_stop_string) == (False, True)
    assert (params.stop_strings, params.logit_bias) == (("x", "y"), ((65, -100.0),))


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "temperature_out_of_range"),
        ({"temperature": "hot"}, "temperature", "parameter_invalid"),
        ({"temperature": True}, "temperature", "parameter_invalid"),
        ({"top_p": 0}, "top_p", "top_p_out_of_range"),
        ({"prompt": ""}, "prompt", "prompt_empty"),
        ({"prompt": []}, "prompt", "prompt_count_out_of_range"),
        ({"prompt": [1, 260]}, "prompt[1]", "token_id_out_of_range"),
        ({"prompt": "a\ud800"}, "prompt", None),
        ({"prompt": "x" * 512}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 512}, "max_tokens", "context_length_exceeded"),
        ({"n": 0}, "n", "num_choices_out_of_range"),
        ({"logprobs": 21}, "logprobs", "num_logprobs_out_of_range"),
        ({"seed": -1}, "seed", "seed_out_of_range"),
        ({"stop": [""]}, "stop", "stop_string_empty"),
        ({"logit_bias": {"x": 1}}, None, "parameter_invalid"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options_without_stream"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"suffix": "x"}, "suffix", "parameter_not_served"),
        ({"echo": 0}, "echo", "parameter_invalid"),
        ({"echo": True, "logprobs": 21}, "logprobs", "num_logprobs_out_of_range"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens_out_of_range"),
        ({"best_of": 2, "n": 3}, "best_of", "best_of_out_of_range"),
        ({"best_of": 2, "stream": True}, "best_of", "best_of_streamed"),
        ({"priority": 101}, "priority", "priority_out_of_range"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "num_prompt_logprobs_out_of_range"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "prompt_logprobs_streamed"),
    ],
)
async def test_completion_refusals(web, doors, change, param, code):
    body = json.dumps({"model": "tiny", "prompt": "a", **change})  # keeps a lone surrogate as an escape
    answer = await web.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param or error["param"].startswith(f"{param}.")
    assert doors.engine.requests == []


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            None,
            "content_not_served",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "parameter_missing"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice_without_tools"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content_missing"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", None),
        ({"top_logprobs": 1}, "top_logprobs", "top_logprobs_without_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "num_logprobs_out_of_range"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "max_tokens_twice"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_tokens_out_of_range"),
    ],
)
async def test_chat_refusals(web, doors, change, param, code):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **change}
    answer = await web.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    assert doors.engine.requests == []


async def test_parameters_that_ask_for_nothing_are_accepted(web):
    shared = {"n": 1, "best_of": 1, "echo": False, "user": "u", "seed": None, "stop": None, "max_tokens": 2}
    completion = {"prompt": "a", "suffix": None, "logprobs": None, "stream": False, **shared}
    answer = await web.post("/v1/completions", json=completion)
    assert answer.status_code == 200, answer.text
    chat = {
        "messages": [{"role": "user", "content": "x"}], "tools": None, "tool_choice": "none", "logprobs": False,
        "response_format": {"type": "text"}, "store": False, "metadata": {}, "top_k": -1, **shared,
    }  # fmt: skip
    answer = await web.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[1]", b'"x"', b"", b"[" * 100_000, b'{"prompt": "\xff"}'])
async def test_bodies_that_are_no_json_object(web, body):
    answer = await web.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_bodies_that_are_too_large(web):
    async def pieces():
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    for body in (b" " * (MAX_BODY_BYTES + 1), pieces()):
        answer = await web.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_unknown_paths_and_models(client, web):
    answer = await web.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = await web.get("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"


async def test_no_chat_template():
    async with open_doors(Doors(template=None)) as doors, httpx.AsyncClient(base_url=doors.http) as web:
        answer = await web.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "kind", "status"),
    [
        (errors.ResourceExhaustedError("QUEUE_FULL", "full", retry_after_s=1.5), openai.RateLimitError, 429),
        (errors.UnavailableError("NO_PIPELINE", "none"), openai.InternalServerError, 503),
        (errors.DeadlineExceededError("DEADLINE_EXCEEDED", "late"), openai.InternalServerError, 504),
        (ZeroDivisionError("secret"), openai.InternalServerError, 500),
    ],
)
async def test_errors_before_the_first_token_have_their_status(client, doors, raised, kind, status, stream):
    failing(raised, 0)(doors.engine)
    with pytest.raises(kind) as caught:
        await client.completions.create(model="tiny", prompt="a", stream=stream)
    assert caught.value.status_code == status
    assert caught.value.response.headers.get("retry-after") == {429: "2", 503: "1"}.get(status)
    assert "secret" not in caught.value.response.text


async def test_error_in_the_middle_of_a_stream(web, client, doors):
    failing(errors.UnavailableError("PIPELINE_LOST", "lost"), 2)(doors.engine)
    answer = await web.post("/v1/completions", json={"prompt": "a", "stream": True})
    received = [json.loads(event) for event in events(answer.text)]  # no [DONE]
    assert received[-1]["error"]["code"] == "pipeline_lost"
    assert received[0]["choices"][0]["text"] == "h"
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        async for _ in stream:
            pass


async def test_stream_ends_with_done(web):
    answer = await web.post("/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events(answer.text)[-1] == "[DONE]"


async def test_one_prompt_of_a_list_fails_and_the_others_end(client, doors):
    failing(errors.UnavailableError("PIPELINE_LOST", "lost"), 3)(doors.engine)
    doors.engine.token_s = 0.01
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model="tiny", prompt=["a", "b", "c"], max_tokens=400)
    assert len(doors.engine.requests) == 3


@pytest.mark.parametrize("token_s", [0.01, 30.0])
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_closes_the_engines_generators(doors, token_s, stream):
    doors.engine.token_s = token_s
    body = {"prompt": ["a", "b"], "max_tokens": 400, "stream": stream}
    async with httpx.AsyncClient(base_url=doors.http) as web:
        sent = asyncio.create_task(web.post("/v1/completions", json=body))
        await until(lambda: len(doors.engine.requests) == 2)
        await asyncio.sleep(0.05)  # with fast tokens, some are on their way
        sent.cancel()  # closes the connection
        await asyncio.wait({sent})
    await doors.until_cancelled(2)


async def test_deadline_header(web, doors):
    doors.engine.token_s = 0.05
    headers = {"x-request-timeout-s": "0.2"}
    answer = await web.post("/v1/completions", json={"prompt": "a", "max_tokens": 400}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    for wrong in ("soon", "0", "-1", "nan"):
        answer = await web.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout-s": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-s")


def test_the_application_needs_neither_ray_nor_torch():
    code = "import sys, gateway.api.http.app, gateway.api.grpc.server; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
