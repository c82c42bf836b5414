"""Structured output by a real model over two real stages: every answer has the form that was asked for."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from itertools import pairwise

import jsonschema

from gateway.api.raw import ChatPrompt, RawRequest, RawResume, TextPrompt
from gateway.api.service import Frontend
from gateway.config import from_mapping
from gateway.engine import Engine, EngineSettings
from gateway.grammar import Constraint
from gateway.model import load_model
from gateway.pipelines.discovery import Registry, ReplicaRecord
from gateway.types import FinishReason
from stages.replica import StageReplica, StageSpec

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]


@asynccontextmanager
async def serving(folder, cuts, dtype: str = "float32"):
    """A Frontend over a pipeline of real stages, and the registry and replicas beneath it."""
    model, tokenizer, template = load_model(
        from_mapping({"model": {"path": str(folder), "max_context_tokens": 1024}}, source="test")
    )
    registry = Registry()
    replicas = [
        StageReplica(
            StageSpec(model=str(folder), start_layer=a, end_layer=b, dtype=dtype, num_blocks=320, num_threads=1)
        )
        for a, b in pairwise(cuts)
    ]
    engine = Engine(
        model=model, tokenizer=tokenizer, registry=registry, fingerprint=model.fingerprint,
        settings=EngineSettings(check_integrity=True, lease_s=2.0),
    )  # fmt: skip
    try:
        for replica in replicas:
            await replica.start()
        await engine.start()
        registry.set_replicas("test", [ReplicaRecord(**replica.metadata()) for replica in replicas])
        async with asyncio.timeout(60):
            await engine.wait_ready()
        yield Frontend(engine, tokenizer, template, model), registry, replicas
    finally:
        await engine.stop()
        for replica in replicas:
            await replica.stop()


async def answer(frontend: Frontend, prompt, constraint: Constraint | None, **fields):
    raw = RawRequest(
        prompt=prompt, constraint=constraint, **{"max_tokens": 200, "temperature": 1.0, "top_k": 0, **fields}
    )
    [choice] = (await frontend.collect(await frontend.accept(raw))).choices
    return choice


def check_json(text: str) -> None:
    jsonschema.validate(json.loads(text), PERSON)


def check_color(text: str) -> None:
    assert re.fullmatch(r"#[0-9a-f]{6}", text)


def check_choice(text: str) -> None:
    assert text in ("yes", "no", "maybe so")


def check_sum(text: str) -> None:
    assert re.fullmatch(r"[1-9](\+[1-9]){0,20}", text)


FORMS = [
    (Constraint.json_schema(PERSON, "f"), check_json),
    (Constraint("regex", "#[0-9a-f]{6}", "f"), check_color),
    (Constraint.choice(["yes", "no", "maybe so"], "f"), check_choice),
    (Constraint("grammar", 'start: NUM ("+" NUM){0,20}\nNUM: /[1-9]/', "f"), check_sum),
    (Constraint("grammar", 'root ::= "yes" | "no"', "f"), check_choice),
]


async def test_fifty_answers_have_their_form(model_folder):
    """At temperature 1 a model of 135 million parameters keeps to none of these by itself."""
    async with serving(model_folder("smollm2"), (0, 7, 30)) as (frontend, _, _):
        prompt = TextPrompt("Describe a person as JSON:\n")
        work = [(answer(frontend, prompt, form, seed=seed), check) for seed in range(10) for form, check in FORMS]
        choices = await asyncio.gather(*(one for one, _ in work))
        for choice, (_, check) in zip(choices, work, strict=True):
            assert choice.finish_reason is FinishReason.STOP, choice.text
            check(choice.text)
        assert len({choice.text for choice in choices[::5]}) == 10  # ten seeds, ten persons

        # A neighbour in the same micro-batches without a grammar says what it says alone.
        alone = await answer(frontend, prompt, None, temperature=0.0, max_tokens=30)
        free, _ = await asyncio.gather(
            answer(frontend, prompt, None, temperature=0.0, max_tokens=30),
            answer(frontend, prompt, FORMS[0][0], seed=3),
        )
        assert free.text == alone.text


async def test_min_tokens_gives_way_where_the_grammar_ends(model_folder):
    async with serving(model_folder("smollm2"), (0, 30)) as (frontend, _, _):
        choice = await answer(frontend, TextPrompt("x"), FORMS[2][0], min_tokens=50, seed=1)
        check_choice(choice.text)


async def test_a_resumed_answer_goes_on_in_its_form(model_folder):
    async with serving(model_folder("smollm2"), (0, 30)) as (frontend, _, _):
        form, check = FORMS[0]
        whole = await answer(frontend, TextPrompt("Person:\n"), form, seed=11)
        for cut in (1, len(whole.token_ids) // 2, len(whole.token_ids) - 1):
            resume = RawResume(
                token_ids=whole.token_ids[:cut], model_fingerprint=frontend.model.fingerprint, seed=11, choice_index=0
            )
            rest = await answer(frontend, TextPrompt("Person:\n"), form, resume=resume)
            assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
        check(whole.text)


async def test_a_lost_stage_does_not_break_the_form(model_folder):
    folder = model_folder("smollm2")
    async with serving(folder, (0, 15, 30)) as (frontend, registry, replicas):
        form, check = FORMS[0]
        prompt = TextPrompt("Person:\n")
        expected = [(await answer(frontend, prompt, form, seed=seed)).text for seed in range(4)]
        running = [asyncio.create_task(answer(frontend, prompt, form, seed=seed)) for seed in range(4)]
        await asyncio.sleep(0.5)
        await replicas[1].stop()
        assert not any(task.done() for task in running)
        replicas[1] = StageReplica(replicas[1].spec)
        await replicas[1].start()
        registry.set_replicas("test", [ReplicaRecord(**replica.metadata()) for replica in replicas])
        for task, text in zip(running, expected, strict=True):
            choice = await task
            check(choice.text)
            assert choice.text == text


async def test_forced_tool_calls_of_a_model_that_knows_tools(model_folder):
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    named = ChatPrompt(messages, tools=TOOLS, tool_choice="named", tool_name="weather")
    required = ChatPrompt(messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    async with serving(model_folder("qwen-coder"), (0, 12, 24), dtype="bfloat16") as (frontend, _, _):
        choices = await asyncio.gather(
            *(answer(frontend, prompt, None, seed=seed) for prompt in (named, required) for seed in range(2))
        )
    for choice in choices:
        assert (choice.text, choice.finish_reason) == ("", FinishReason.TOOL_CALLS)
        [call] = choice.tool_calls
        assert call.name == "weather"
        jsonschema.validate(json.loads(call.arguments), TOOLS[0]["function"]["parameters"])
