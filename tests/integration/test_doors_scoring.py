"""Log-probabilities of prompts and continuations through both doors, over a whole engine of toy stages."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import grpc
import httpx
import openai
import pytest
from doors_helpers import open_doors
from engine_helpers import NUM_LAYERS, VOCAB_SIZE, Cluster, all_free, expected_scores, expected_tokens, logits_of, until
from google.rpc import error_details_pb2
from test_doors_grpc import failure

from gateway.api.scoring import MAX_CONTINUATIONS, MAX_SCORED_ENTRIES
from gateway.api.service import Frontend
from gateway.tokenizer import ChatTemplate
from stageline.client import AsyncClient, Client
from stageline.errors import InvalidArgumentError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc
from stageline.inference.v1 import scoring_pb2

STAGES = 2


@pytest.fixture
async def doors():
    cluster = Cluster()
    for start, end in ((0, 2), (2, NUM_LAYERS)):
        await cluster.add_stage(start, end, num_blocks=256)
    engine = await cluster.start()
    await until(engine.ready)
    frontend = Frontend(
        engine,
        engine._tokenizer,
        ChatTemplate("{% for m in messages %}{{ m.role + m.content }}{% endfor %}"),
        engine.model,
    )
    async with open_doors(SimpleNamespace(frontend=frontend, engine=engine, cluster=cluster)) as opened:
        yield opened
    await cluster.stop()


@pytest.fixture
async def stub(doors):
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        yield pb_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def web(doors):
    async with httpx.AsyncClient(base_url=doors.http, timeout=20) as opened:
        yield opened


def ids(*values) -> gen.TokenIds:
    return gen.TokenIds(ids=values)


def score_request(context, continuations, **fields) -> scoring_pb2.ScoreRequest:
    return scoring_pb2.ScoreRequest(
        token_ids=ids(*context),
        continuations=[scoring_pb2.Continuation(token_ids=ids(*one)) for one in continuations],
        **fields,
    )


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


async def test_score(stub, doors):
    rng = random.Random(0)
    context = random_tokens(rng, 21)
    greedy = expected_tokens(context, 4, num_stages=STAGES)
    continuations = [greedy, greedy[:1], [*greedy[:3], (greedy[3] + 1) % 256]]
    continuations += [random_tokens(rng, 1 + at % 5) for at in range(30)]
    response = await stub.Score(score_request(context, continuations, request_id="s1"))
    assert (response.request_id, response.model, response.model_fingerprint) == ("s1", "toy", "toy")
    assert response.usage.prompt_tokens == 21 + sum(map(len, continuations))
    assert [one.is_greedy for one in response.scores[:3]] == [True, True, False]
    for score, continuation in zip(response.scores, continuations, strict=True):
        expected = expected_scores([*context, *continuation], num_stages=STAGES)[20:]
        assert list(score.token_ids) == continuation
        assert list(score.token_logprobs) == pytest.approx(expected, abs=1e-4)
        assert score.sum_logprob == pytest.approx(sum(score.token_logprobs), abs=1e-9)
        assert not score.logprobs
        chosen = [
            expected_tokens([*context, *continuation[:at]], 1, num_stages=STAGES)[0] for at in range(len(expected))
        ]
        assert score.is_greedy == (chosen == continuation)
    await until(lambda: all_free(doors.engine))


async def test_score_with_alternatives_and_texts(stub):
    request = scoring_pb2.ScoreRequest(
        text="ab", continuations=[scoring_pb2.Continuation(text=text) for text in ("c", "de")], num_logprobs=3
    )
    response = await stub.Score(request)
    tokens = await stub.Tokenize(pb.TokenizeRequest(text="abde"))
    score = response.scores[1]
    assert list(score.token_ids) == list(tokens.token_ids[2:])
    expected = expected_scores(tokens.token_ids, num_stages=STAGES)[1:]
    for entry, token_id, text, logprob in zip(score.logprobs, score.token_ids, b"de", expected, strict=True):
        assert (entry.chosen.token_id, entry.chosen.token) == (token_id, bytes([text]))
        assert entry.chosen.logprob == pytest.approx(logprob, abs=1e-4)
        assert len(entry.top) == 3
        assert sorted(entry.top, key=lambda one: -one.logprob) == list(entry.top)
        assert sum(one.logprob > entry.chosen.logprob for one in entry.top) == min(3, entry.rank - 1)


async def test_equal_logits_are_greedy_in_one_way(stub, doors, monkeypatch):
    """Of tokens that are equally probable, greedy decoding takes the lowest id, and Score knows."""

    def level(value):
        logits = logits_of(value)
        logits[[5, 9]] = 50.0
        return logits

    monkeypatch.setattr("engine_helpers.logits_of", level)
    response = await stub.Score(score_request([1, 2], [[5], [9]], num_logprobs=2))
    assert [one.is_greedy for one in response.scores] == [True, False]
    assert [one.logprobs[0].rank for one in response.scores] == [1, 1]
    assert [[top.token_id for top in one.logprobs[0].top] for one in response.scores] == [[5, 9], [5, 9]]
    generation = gen.Generation(
        token_ids=ids(1, 2), stop=gen.StopConditions(max_tokens=1), sampling=gen.SamplingParams(temperature=0)
    )
    answer = await stub.Generate(pb.GenerateRequest(generation=generation))
    assert list(answer.choices[0].token_ids) == [5]


@pytest.mark.parametrize(
    ("request_", "code", "reason", "field"),
    [
        (score_request([1], []), "INVALID_ARGUMENT", "CONTINUATIONS_OUT_OF_RANGE", "continuations"),
        (
            score_request([1], [[1]] * (MAX_CONTINUATIONS + 1)),
            "INVALID_ARGUMENT",
            "CONTINUATIONS_OUT_OF_RANGE",
            "continuations",
        ),
        (score_request([1], [[1], []]), "INVALID_ARGUMENT", "CONTINUATION_EMPTY", "continuations[1]"),
        (score_request([], [[1]]), "INVALID_ARGUMENT", "PROMPT_EMPTY", "context"),
        (score_request([1], [[1]], model="other"), "NOT_FOUND", "MODEL_NOT_FOUND", "model"),
        (score_request([1], [[1]], num_logprobs=21), "INVALID_ARGUMENT", "NUM_LOGPROBS_OUT_OF_RANGE", "num_logprobs"),
        (score_request([VOCAB_SIZE], [[1]]), "INVALID_ARGUMENT", "TOKEN_ID_OUT_OF_RANGE", "context[0]"),
        (
            score_request([1], [[1], [2, VOCAB_SIZE]]),
            "INVALID_ARGUMENT",
            "TOKEN_ID_OUT_OF_RANGE",
            "continuations[1][1]",
        ),
        (score_request([1] * 190, [[1] * 11]), "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", "continuations[0]"),
        (
            score_request([1], [[1] * 50] * (MAX_SCORED_ENTRIES // 50 // 21 + 1), num_logprobs=20),
            "INVALID_ARGUMENT",
            "CONTINUATIONS_TOO_LONG",
            "continuations",
        ),
        (
            scoring_pb2.ScoreRequest(continuations=[scoring_pb2.Continuation(text="a")]),
            "INVALID_ARGUMENT",
            "PROMPT_MISSING",
            "context",
        ),
        (
            scoring_pb2.ScoreRequest(text="a", continuations=[scoring_pb2.Continuation()]),
            "INVALID_ARGUMENT",
            "CONTINUATION_MISSING",
            "continuations[0]",
        ),
    ],
)
async def test_score_refusals(stub, request_, code, reason, field):
    error, details = await failure(stub.Score(request_))
    info = details[error_details_pb2.ErrorInfo]
    assert (error.code().name, info.reason, info.metadata["field"]) == (code, reason, field)


async def test_score_ends_with_its_client_and_at_its_deadline(stub, doors):
    for stage in doors.cluster.stages:
        stage.runner.delay_s = 0.05
    long = score_request([1] * 100, [[1] * 90] * 200)
    call = stub.Score(long)
    await until(lambda: not all_free(doors.engine))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: all_free(doors.engine))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(long, timeout=0.3)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: all_free(doors.engine))


async def test_the_client_package_scores(doors):
    request = score_request([1, 2, 3], [[4], [5, 6]], request_id="mine")
    async with AsyncClient(doors.grpc) as client:
        first = await client.score(request, timeout_s=20)
        with pytest.raises(InvalidArgumentError):
            await client.score(score_request([1], []))

    def sync():
        with Client(doors.grpc) as client:
            return client.score(request, timeout_s=20)

    second = await asyncio.to_thread(sync)
    first.usage.cached_prompt_tokens = second.usage.cached_prompt_tokens  # the cache may know the context by then
    assert first == second
    assert first.scores[1].sum_logprob == pytest.approx(
        sum(expected_scores([1, 2, 3, 5, 6], num_stages=STAGES)[2:]), abs=1e-4
    )


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_generate_with_prompt_logprobs(stub, max_tokens):
    prompt = random_tokens(random.Random(max_tokens), 30)
    generation = gen.Generation(
        token_ids=ids(*prompt),
        num_choices=2,
        stop=gen.StopConditions(max_tokens=max_tokens),
        sampling=gen.SamplingParams(temperature=0),
        output=gen.OutputOptions(num_prompt_logprobs=2),
    )
    whole = await stub.Generate(pb.GenerateRequest(generation=generation))
    streamed: dict[int, list[gen.ChoiceDelta]] = {0: [], 1: []}
    async for message in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation)):
        for delta in message.choices:
            streamed[delta.index].append(delta)
    for index, choice in enumerate(whole.choices):
        assert [entry.chosen.token_id for entry in choice.prompt_logprobs] == prompt[1:]
        got = [entry.chosen.logprob for entry in choice.prompt_logprobs]
        assert got == pytest.approx(expected_scores(prompt, num_stages=STAGES), abs=1e-4)
        assert all(len(entry.top) == 2 and entry.rank for entry in choice.prompt_logprobs)
        assert list(choice.token_ids) == expected_tokens(prompt, max_tokens, num_stages=STAGES)
        assert choice.finish_reason == gen.FINISH_REASON_LENGTH
        first, *later = streamed[index]
        assert list(first.prompt_logprobs) == list(choice.prompt_logprobs)
        assert not any(delta.prompt_logprobs for delta in later)


def check_echoed(choice, prompt, num_generated, *, tokenizer) -> None:
    logprobs = choice["logprobs"]
    tokens = [*prompt, *expected_tokens(prompt, num_generated, num_stages=STAGES)]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected_scores(tokens, num_stages=STAGES), abs=1e-4)
    assert {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {
        len(tokens)
    }
    assert choice["text"].startswith(tokenizer.decode(prompt, skip_special_tokens=False))
    for number, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert 1 <= len(top) <= 2  # the best, and the token itself where it is another
        assert number in top.values()  # the same float: harnesses compare them
    for text, place, after in zip(
        logprobs["tokens"], logprobs["text_offset"], [*logprobs["text_offset"][1:], None], strict=True
    ):
        if not text.startswith("bytes:"):
            # Bytes that are no character are shown with the next token.
            assert choice["text"][place:after].lstrip("\ufffd") == text


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
async def test_echo_with_logprobs(web, doors, max_tokens):
    tokenizer = doors.frontend.tokenizer
    prompts = [list(tokenizer.encode(text)) for text in ("a", "hello", "two and two is four, or so they say")]
    bodies = [prompts, [tokenizer.decode(prompt) for prompt in prompts], prompts[1], "hello"]
    for body in bodies:
        # As lm-evaluation-harness asks.
        asked = {"model": "toy", "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
        answer = await web.post("/v1/completions", json={**asked, "prompt": body})
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        asked_prompts = prompts if len(choices) == 3 else prompts[1:2]
        for choice, prompt in zip(choices, asked_prompts, strict=True):
            check_echoed(choice, prompt, max_tokens, tokenizer=tokenizer)
        assert answer.json()["usage"]["completion_tokens"] == max_tokens * len(choices)


async def test_echo_streams_the_prompt_first(doors):
    prompt = list(doors.frontend.tokenizer.encode("hello"))
    pieces: dict[int, list] = {}
    async with openai.AsyncOpenAI(base_url=f"{doors.http}/v1", api_key="none") as client:
        stream = await client.completions.create(
            model="toy", prompt=prompt, max_tokens=3, logprobs=1, echo=True, n=2, temperature=0, stream=True
        )
        async for chunk in stream:
            for choice in chunk.choices:
                pieces.setdefault(choice.index, []).append(choice)
    for choices in pieces.values():
        lists = [choice.logprobs.model_dump() for choice in choices if choice.logprobs]
        logprobs = {
            name: [entry for one in lists for entry in one[name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        whole = {"text": "".join(choice.text for choice in choices), "logprobs": logprobs}
        check_echoed(whole, prompt, 3, tokenizer=doors.frontend.tokenizer)
    assert sorted(pieces) == [0, 1]


async def test_a_generated_end_token_has_its_place(web, doors, monkeypatch):
    """Harnesses cut off exactly one generated token."""

    def ends(value):
        logits = logits_of(value)
        logits[256] = 50.0
        return logits

    monkeypatch.setattr("engine_helpers.logits_of", ends)
    doors.frontend.model.generation_defaults["eos_token_id"] = 256
    body = {"prompt": [1, 2, 3], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    choice = (await web.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert choice["logprobs"]["tokens"][3] == "<end>"


async def test_prompt_logprobs_in_the_form_of_vllm(web):
    prompt = [10, 20, 30]
    body = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 2, "temperature": 0}
    choice = (await web.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["logprobs"] is None
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for entry, token_id, logprob in zip(others, prompt[1:], expected_scores(prompt, num_stages=STAGES), strict=True):
        assert entry[str(token_id)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert {1, 2} <= {one["rank"] for one in entry.values()}
        assert set(entry[str(token_id)]) == {"logprob", "rank", "decoded_token"}


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_prompt_logprobs_of_a_conversation(web, max_tokens):
    messages = [{"role": "user", "content": "hello"}]
    prompt = (await web.post("/tokenize", json={"messages": messages})).json()["tokens"]
    body = {"messages": messages, "max_completion_tokens": max_tokens, "prompt_logprobs": 1, "temperature": 0, "n": 2}
    answer = (await web.post("/v1/chat/completions", json=body)).json()
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    first, *others = answer["prompt_logprobs"]
    assert first is None
    got = [entry[str(token_id)]["logprob"] for entry, token_id in zip(others, prompt[1:], strict=True)]
    assert got == pytest.approx(expected_scores(prompt, num_stages=STAGES), abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    plain = (
        await web.post("/v1/chat/completions", json={**body, "max_completion_tokens": 2, "prompt_logprobs": None})
    ).json()
    assert "prompt_logprobs" not in plain
    if max_tokens:
        assert [choice["message"] for choice in plain["choices"]] == [choice["message"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt_logprobs": 21}, "num_prompt_logprobs_out_of_range"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs_streamed"),
        ({"prompt_logprobs": None, "max_completion_tokens": 0}, "max_tokens_out_of_range"),
    ],
)
async def test_a_conversation_refuses_what_cannot_be_scored(web, fields, code):
    body = {"messages": [{"role": "user", "content": "hello"}], "prompt_logprobs": 1, **fields}
    refused = await web.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    assert refused.json()["error"]["param"] in fields


async def test_a_prompt_as_long_as_the_context(web):
    body = {"prompt": [1] * 200, "max_tokens": 0, "logprobs": 0, "echo": True}
    choice = (await web.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        expected_scores([1] * 200, num_stages=STAGES), abs=1e-4
    )
    assert choice["logprobs"]["top_logprobs"] == [None, *[{}] * 199]
    refused = await web.post("/v1/completions", json={**body, "prompt": [1] * 201})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
