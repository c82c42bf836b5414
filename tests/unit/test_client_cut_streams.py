"""Streams cut anywhere and put together by the client are the uncut ones: through the whole door, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import write_folder

from gateway.api.grpc.servicer import InferenceServicer
from gateway.api.service import Frontend
from gateway.engine.choice import ChoiceState
from gateway.engine.deltas import Deltas
from gateway.metrics import Metrics
from gateway.tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from gateway.types import ChoiceDelta, GenerateRequest, ModelInfo, PipelineStatus, ReplicaStatus, TokenLogprobs
from stageline.client.collect import Collector
from stageline.client.progress import Progress
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb

CONTEXT_TOKENS = 4096
TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 👍🏽"}}\n</tool_call>'
TOOL = gen.Tool(name="weather", parameters_json_schema=json.dumps({"type": "object"}))
# Pieces that make held text likely: characters of several bytes, beginnings of stop strings, tool calls and their halves.
PIECES = (
    "é",
    "e\u0301",
    "你好",
    "🎉👩‍👩‍👧",
    " end",
    "en",
    "ende",
    "STO",
    "STOP",
    "\n\n",
    "<tool_call>",
    "<tool",
    CALL,
    "x",
    "<|im_end|>",
)
STOPS = ("ender", "STOP!", "好，", "👩‍👧x", "é\n", "xx", "</tool_call>", " <too")


class ScriptedEngine:
    """Says what the script says, through the engine's own ChoiceState; a resumed choice goes on in its script."""

    def __init__(self, tokenizer: Tokenizer, scripts: list[list[int]]) -> None:
        self._tokenizer, self._scripts = tokenizer, scripts
        self.metrics = Metrics("tiny", lambda: ())

    def ready(self) -> bool:
        return True

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        return ()

    def check_room(self) -> None:
        pass

    def spares(self) -> tuple[ReplicaStatus, ...]:
        return ()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[ChoiceDelta]:
        deltas = Deltas()
        choices = [
            ChoiceState(request, request.first_choice + i, i, self._tokenizer, CONTEXT_TOKENS, deltas)
            for i in range(request.num_choices)
        ]
        while not all(choice.ended for choice in choices) or not deltas.empty():
            for choice in choices:
                if choice.ended:
                    continue
                place = len(choice.sequence.output_token_ids)
                token = self._scripts[choice.index][place]
                choice.sequence.output_token_ids.append(token)
                choice.append(token, TokenLogprobs(token, -place / 8 - choice.index, ((token, -0.5), (place, -1.5))))
            while not deltas.empty():
                yield await deltas.get()


class Context:
    """What a servicer asks of a call."""

    def time_remaining(self) -> None:
        return None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("tokenizer")))


async def received(
    servicer: InferenceServicer, generation: gen.Generation, cuts: Iterator[int]
) -> tuple[pb.GenerateResponse, list[pb.StreamGenerateResponse], int]:
    """What a client gets whose attempts break after so many messages each, and how many attempts it took."""
    progress, collector, seen, num_attempts = Progress(generation), Collector(), [], 0
    while not progress.finished:
        num_attempts += 1
        left = next(cuts)
        for request in progress.requests():
            if left <= 0:
                break
            stream = servicer.StreamGenerate(pb.StreamGenerateRequest(generation=request), Context())
            async with aclosing(stream) as messages:
                async for message in messages:
                    if (fresh := progress.receive(message)) is not None:
                        seen.append(fresh)
                    left -= 1
                    if left <= 0:
                        break
    seen.append(progress.last())
    for message in seen:
        collector.take(message)
    return collector.answer(), seen, num_attempts


def plain(answer: pb.GenerateResponse) -> pb.GenerateResponse:
    """Without what no two requests have in common."""
    answer.start.created_s, answer.start.request_id = 0, ""
    for choice in answer.choices:
        for call in choice.tool_calls:
            call.id = "set" if call.id else ""
    return answer


def compare(tokenizer: Tokenizer, scripts: list[list[int]], generation: gen.Generation, cuts: Iterable[int]) -> int:
    """Fails unless the cut streams put together are the uncut one. Returns the number of attempts."""
    model = ModelInfo(
        name="scripted", fingerprint="f", max_context_tokens=CONTEXT_TOKENS, vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.encode("<|im_end|>")),
    )  # fmt: skip
    frontend = Frontend(ScriptedEngine(tokenizer, scripts), tokenizer, ChatTemplate(TEMPLATE), model)
    servicer = InferenceServicer(frontend)
    whole, _, once = asyncio.run(received(servicer, generation, repeat(10**9)))
    assert once == 1
    cut, seen, num_attempts = asyncio.run(received(servicer, generation, iter(cuts)))
    assert plain(cut) == plain(whole)
    assert [message.HasField("start") for message in seen] == [True] + [False] * (len(seen) - 1)
    assert [message.HasField("usage") for message in seen] == [False] * (len(seen) - 1) + [True]
    return num_attempts


def asked(**fields) -> gen.Generation:
    generation = gen.Generation(token_ids=gen.TokenIds(ids=[1, 2, 3]), sampling=gen.SamplingParams(seed=11))
    generation.MergeFrom(gen.Generation(**fields))
    return generation


@pytest.mark.parametrize("tokens_each", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_a_cut_after_every_few_tokens(tokenizer, tokens_each, num_choices):
    text = "Grüße 你好，世界! STO STOP endE 🎉👩‍👩‍👧🇩🇪 é e\u0301 ender"
    bytewise = [token for char in text for token in tokenizer.encode(char)]
    scripts = [tokenizer.encode(text) + tokenizer.encode("!" * 9), bytewise][:num_choices]
    # All but the last begin somewhere in the text and come to nothing.
    late = ["STOP!", "好。", "👩‍👧x", "é\n", "enden", "ender"]
    stop = gen.StopConditions(max_tokens=min(map(len, scripts)), stop_strings=late)
    output = gen.OutputOptions(num_logprobs=1)
    generation = asked(stop=stop, output=output, num_choices=num_choices)
    # The `start` is a message as well.
    assert compare(tokenizer, scripts, generation, repeat(tokens_each + 1)) > 2


def test_a_cut_within_a_tool_call_while_a_stop_string_is_held_back(tokenizer):
    script = tokenizer.encode(f"Let me see. {CALL} done") + tokenizer.encode("<|im_end|>")
    talk = gen.Conversation(messages=[gen.Message(role="user", content="?")], tools=[TOOL])
    stop = gen.StopConditions(max_tokens=len(script), stop_strings=["see.!", '"city": 1', "</tool_call> do!"])
    generation = gen.Generation(conversation=talk, stop=stop, sampling=gen.SamplingParams(seed=1))
    for tokens_each in (1, 2, 3, 7):
        assert compare(tokenizer, [script], generation, repeat(tokens_each + 1)) > 2


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_cuts_of_any_answer(tokenizer, data):
    num_choices = data.draw(st.integers(1, 3), label="num_choices")
    piece = st.sampled_from(PIECES).map(tokenizer.encode) | st.integers(0, tokenizer.vocab_size - 1).map(lambda i: [i])
    script = st.lists(piece, min_size=1, max_size=25).map(lambda pieces: [token for part in pieces for token in part])
    scripts = [data.draw(script, label="script") for _ in range(num_choices)]
    max_tokens = min(map(len, scripts))
    stop = gen.StopConditions(
        max_tokens=max_tokens,
        min_tokens=data.draw(st.integers(0, max_tokens), label="min_tokens"),
        stop_strings=data.draw(st.lists(st.sampled_from(STOPS), max_size=4, unique=True), label="stop_strings"),
        include_stop_string=data.draw(st.booleans(), label="include_stop_string"),
        ignore_eos=data.draw(st.booleans(), label="ignore_eos"),
    )
    generation = asked(stop=stop, num_choices=num_choices)
    generation.output.skip_special_tokens = data.draw(st.booleans(), label="skip_special_tokens")
    if data.draw(st.booleans(), label="tools"):
        generation.conversation.CopyFrom(
            gen.Conversation(messages=[gen.Message(role="user", content="?")], tools=[TOOL])
        )
    if data.draw(st.booleans(), label="echo_prompt"):
        generation.output.echo_prompt = True
    else:
        generation.output.num_logprobs = 2
    cuts = data.draw(st.lists(st.integers(0, 12), max_size=20), label="cuts")
    compare(tokenizer, scripts, generation, [*cuts, *repeat(10**9, 1)])
