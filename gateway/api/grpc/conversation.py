"""Conversations with their tools, from protobuf messages."""

from __future__ import annotations

import json
import re
from typing import Any

from gateway.api.raw import ChatPrompt
from stageline.errors import InvalidArgumentError
from stageline.inference.v1 import generation_pb2 as gen

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_CHOICES = {
    gen.TOOL_CHOICE_MODE_UNSPECIFIED: "auto",
    gen.TOOL_CHOICE_MODE_AUTO: "auto",
    gen.TOOL_CHOICE_MODE_NONE: "none",
    gen.TOOL_CHOICE_MODE_REQUIRED: "required",
    gen.TOOL_CHOICE_MODE_FUNCTION: "named",
}


def chat_prompt(conversation: gen.Conversation, path: str) -> ChatPrompt:
    """`path` is where the conversation is in its request. Raises InvalidArgumentError for a tool without a proper name,
    a schema or arguments that are no JSON object, an unknown mode, and two ways to begin the answer."""
    choice = conversation.tool_choice
    if choice.mode not in _CHOICES:
        field = f"{path}.tool_choice.mode"
        raise InvalidArgumentError(
            "TOOL_CHOICE_INVALID", f"{field} is {choice.mode}, which is no mode", field=field, value=choice.mode
        )
    if conversation.continue_final_message and conversation.add_generation_prompt:
        field = f"{path}.continue_final_message"
        raise InvalidArgumentError(
            "CONTINUE_WITH_GENERATION_PROMPT",
            f"{field} goes on with the last message, add_generation_prompt begins a new one; send one", field=field,
        )  # fmt: skip
    return ChatPrompt(
        [_turn(message, f"{path}.messages[{place}]") for place, message in enumerate(conversation.messages)],
        tools=[_tool(tool, f"{path}.tools[{place}]") for place, tool in enumerate(conversation.tools)],
        tool_choice=_CHOICES[choice.mode],
        tool_name=choice.function_name,
        parallel_tool_calls=not conversation.HasField("parallel_tool_calls") or conversation.parallel_tool_calls,
        add_generation_prompt=not conversation.HasField("add_generation_prompt") or conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
    )


def _turn(message: gen.Message, path: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls and message.role != "assistant":
        raise InvalidArgumentError(
            "TOOL_CALLS_MISPLACED", f"{path} has tool_calls, which only the assistant makes", field=f"{path}.tool_calls"
        )
    if message.tool_calls:
        # Templates write the arguments as JSON, so they get the object.
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _json_object(call.arguments, f"{path}.tool_calls[{place}].arguments"),
                },
            }
            for place, call in enumerate(message.tool_calls)
        ]
    return turn


def _tool(tool: gen.Tool, path: str) -> dict[str, Any]:
    if _NAME.fullmatch(tool.name) is None:
        raise InvalidArgumentError(
            "TOOL_NAME_INVALID", f"{path}.name must be 1 to 128 letters, digits, '_', '.' or '-'", field=f"{path}.name"
        )
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json_schema:
        function["parameters"] = _json_object(tool.parameters_json_schema, f"{path}.parameters_json_schema")
    return {"type": "function", "function": function}


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidArgumentError("JSON_OBJECT_EXPECTED", f"{field} must be the text of a JSON object", field=field)
    return value
