"""Structured output: how many constrained answers are valid, and what the constraint costs at many streams.

    python -m benchmarks.structured --model DIR [--stages 1] [--dtype float32] [--generations 200] [--streams 16] [--repeats 5] [--new-tokens 64]

starts a server of its own, unless one is given. First answers are generated through the `openai` client at temperature 1, half by JSON schemas, half
as calls of tools; each is parsed and checked against its schema by `jsonschema`. Then greedy streams run in turn with and without
a schema that never lets an answer end. Prints one JSON object; exits 1 where an answer is not valid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from typing import Any

import jsonschema
import openai
from openai.types.chat import ChatCompletionMessage

from benchmarks.report import about, options
from benchmarks.servers import given_or_serving
from gateway.bench.load import Generator, Shape
from gateway.bench.measure import throughput
from stageline.inference.v1 import generation_pb2 as gen

Schema = dict[str, Any]


def closed(**properties: Schema) -> Schema:
    """An object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


# Bounded, so that a model that rambles at temperature 1 comes to the end of its answer.
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 24}
DAY: Schema = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$"}
SCHEMAS: dict[str, Schema] = {
    "person": closed(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 150}, member={"type": "boolean"}),
    "event": closed(title=NAME, day=DAY, guests={"type": "array", "items": NAME, "minItems": 1, "maxItems": 4}),
    "price": closed(currency={"enum": ["EUR", "USD", "CNY"]}, amount={"type": "number", "minimum": 0, "maximum": 9999}),
    "either": closed(contact={"anyOf": [closed(phone={"type": "string", "pattern": "^[0-9]{6,10}$"}), closed(name=NAME)]}),
    "nothing": closed(value={"type": ["string", "null"], "maxLength": 12}, kind={"const": "optional"}),
    "list": {"type": "array", "items": closed(x={"type": "integer", "minimum": -9, "maximum": 9}), "minItems": 2, "maxItems": 6},
    "referred": {**closed(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}), "$defs": {"leaf": closed(name=NAME)}},
}  # fmt: skip
TOOLS: dict[str, Schema] = {
    "get_weather": closed(city=NAME, days={"type": "integer", "minimum": 1, "maximum": 9}),
    "send_message": closed(to={"type": "array", "items": NAME, "minItems": 1, "maxItems": 3}, text={"type": "string", "maxLength": 60}),
    "set_alarm": closed(hour={"type": "integer", "minimum": 0, "maximum": 23}, repeat={"enum": ["never", "daily", "weekly"]}),
    "now": closed(),
}  # fmt: skip
ENDLESS = {"type": "array", "items": SCHEMAS["person"], "minItems": 100_000}
TOPICS = (
    "a train to Beijing",
    "the weather in Lyon",
    "my cousin's birthday",
    "a broken bicycle",
    "prices of tea",
    "an old friend",
)


async def answer(client: openai.AsyncOpenAI, model: str, number: int) -> str:
    """What is wrong with the answer of this number; empty where it is valid. Tools have the odd numbers."""
    number_of_kind = number // 2
    messages: Any = [{"role": "user", "content": f"Tell me about {TOPICS[number % len(TOPICS)]}, number {number}."}]
    extra: dict[str, Any]
    if number % 2:
        extra = {"tools": [as_tool(name, schema) for name, schema in TOOLS.items()], "tool_choice": "required"}
        if number_of_kind % 2:
            extra["tool_choice"] = {"type": "function", "function": {"name": named_tool(number_of_kind)}}
    else:
        name = list(SCHEMAS)[number_of_kind % len(SCHEMAS)]
        extra = {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": name, "strict": True, "schema": SCHEMAS[name]},
            }
        }
    reply = await client.chat.completions.create(
        model=model, messages=messages, temperature=1.0, seed=number, max_tokens=1024, **extra
    )
    [choice] = reply.choices
    if choice.finish_reason not in ("stop", "tool_calls"):
        return f"{number}: finish_reason {choice.finish_reason}: {choice.message}"
    try:
        if number % 2:
            check_calls(choice.message, named_tool(number_of_kind) if number_of_kind % 2 else None)
        else:
            validate(choice.message.content or "", SCHEMAS[name])
    except (ValueError, KeyError, jsonschema.ValidationError) as error:
        return f"{number}: {error!r}: {choice.message}"
    return ""


def named_tool(number: int) -> str:
    """The tool that the call of this number has to be of."""
    return list(TOOLS)[number // 2 % len(TOOLS)]


def as_tool(name: str, parameters: Schema) -> dict[str, Any]:
    """A tool as OpenAI's API has it."""
    return {
        "type": "function",
        "function": {"name": name, "description": name.replace("_", " "), "parameters": parameters},
    }


def check_calls(message: ChatCompletionMessage, named: str | None) -> None:
    """Raises where there is no call, a call of something else, or one with arguments that its schema refuses."""
    if not message.tool_calls:
        raise ValueError("no call")
    for call in message.tool_calls:
        if call.type != "function" or named not in (None, call.function.name):
            raise ValueError(f"{call} is no call of {named}")
        validate(call.function.arguments, TOOLS[call.function.name])


def validate(text: str, schema: Schema) -> None:
    """Raises where it is not JSON or not what the schema accepts."""
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)


async def all_valid(url: str, model: str, count: int, at_a_time: int) -> list[str]:
    """What is wrong with the answers."""
    gate = asyncio.Semaphore(at_a_time)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800) as client:

        async def one(number: int) -> str:
            async with gate:
                return await answer(client, model, number)

        return [wrong for wrong in await asyncio.gather(*map(one, range(count))) if wrong]


async def rates(address: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Output tokens a second, free and constrained, of each repeat, after one that warms up."""
    shape, runs = Shape(args.prompt_tokens, args.new_tokens), []
    schema = gen.Constraint(json_schema=json.dumps(ENDLESS))
    async with Generator(address, seed=0) as free, Generator(address, seed=0, constraint=schema) as constrained:
        for repeat in range(args.repeats + 1):
            pair = {}
            for load in (free, constrained) if repeat % 2 else (constrained, free):
                pair[load] = (await throughput(load, shape, args.streams, 1, warm=False))["output_tokens_per_s"]
            runs.append((pair[free], pair[constrained]))
    return runs[1:]


def main() -> int:
    """Serve, generate, check, measure, print."""
    parser = options(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--chat-template-file", help="for a model whose own template takes no tools")
    parser.add_argument("--server", nargs=2, metavar=("URL", "GRPC_ADDRESS"), help="one that serves the model already")
    args = parser.parse_args()
    flags = ["--dtype", args.dtype]
    if args.chat_template_file:
        flags += ["--model.chat-template-file", args.chat_template_file]
    with given_or_serving(args.server, args.model, args.stages, *flags) as (url, address):
        model = openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list().data[0].id
        wrong = asyncio.run(all_valid(url, model, args.generations, args.streams))
        runs = asyncio.run(rates(address, args)) if args.repeats else []
    report = {
        **about("structured output: valid answers at temperature 1, and throughput against free answers", args),
        "dtype": args.dtype,
        "answers": args.generations,
        "valid": args.generations - len(wrong),
        "wrong": wrong,
        "streams": args.streams,
        "constrained_to_free": round(statistics.median(b / a for a, b in runs), 3) if runs else None,
        "runs": runs,
    }
    print(json.dumps(report, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
