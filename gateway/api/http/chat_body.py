"""The body of /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gateway.api.http.body import Body, NoOps
from gateway.api.http.schema import NAMES, NO_OPS, GenerationBody, says
from gateway.api.raw import ChatPrompt, RawRequest
from gateway.api.tool_choice import MAX_TOOLS
from gateway.api.validate import MAX_LOGPROBS
from gateway.tokenizer.chat_template import ROLES
from stageline.errors import InvalidArgumentError, UnimplementedError


class ContentPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            raise UnimplementedError(
                "CONTENT_NOT_SERVED", f"content of type {data['type'][:64]!r} is not served; send text",
                field="messages.content.type", value=data["type"][:64],
            )  # fmt: skip
        return data


class FunctionCall(Body):
    """What the model called, in an earlier turn. `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """One call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def for_template(self, field: str) -> dict[str, Any]:
        """Templates write the arguments as JSON, so they get the object. Raises InvalidArgumentError for no object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidArgumentError(
                "TOOL_ARGUMENTS_INVALID", f"{field}.function.arguments must be the text of a JSON object",
                field=f"{field}.function.arguments",
            )  # fmt: skip
        return {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(Body):
    """One turn. Fields that an answer of ours has and that hold nothing may be sent back with it."""

    no_ops: ClassVar[NoOps] = dict.fromkeys(
        ("refusal", "annotations", "audio", "function_call", "reasoning_content"), ([], "")
    )
    role: Annotated[str, Field(json_schema_extra={"enum": list(ROLES)})]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def turn(self, place: int) -> dict[str, Any]:
        """As the chat template takes it. Raises InvalidArgumentError for a turn without content or calls."""
        field = f"messages[{place}]"
        if self.content is None and not self.tool_calls:
            raise InvalidArgumentError("CONTENT_MISSING", f"{field}.content is required", field=f"{field}.content")
        if self.tool_calls and self.role != "assistant":
            raise InvalidArgumentError(
                "TOOL_CALLS_MISPLACED", f"{field} has tool_calls, which only the assistant makes",
                field=f"{field}.tool_calls",
            )  # fmt: skip
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        turn: dict[str, Any] = {"role": self.role, "content": content or ""}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [
                call.for_template(f"{field}.tool_calls[{number}]") for number, call in enumerate(self.tool_calls)
            ]
        return turn


class FunctionDefinition(Body):
    """A function the model may call. `strict` changes nothing: a forced call always keeps to the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are served."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """In OpenAI's form, which is what templates were trained on, without what was not given."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    no_ops: ClassVar[NoOps] = {
        **NO_OPS,
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }
    messages: Annotated[list[ChatMessage], says(minItems=1)]
    max_completion_tokens: Annotated[int | None, says(minimum=0)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, says(minimum=0, maximum=MAX_LOGPROBS)] = None
    tools: Annotated[list[Tool] | None, says(maxItems=MAX_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check(self) -> None:
        """See GenerationBody."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgumentError(
                "TOP_LOGPROBS_WITHOUT_LOGPROBS", "top_logprobs needs logprobs: true", field="top_logprobs"
            )
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidArgumentError(
                "MAX_TOKENS_TWICE",
                "max_tokens and max_completion_tokens differ; send max_completion_tokens",
                field="max_completion_tokens",
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidArgumentError(
                "CONTINUE_WITH_GENERATION_PROMPT",
                "continue_final_message goes on with the last message, add_generation_prompt begins a new one; send one",
                field="continue_final_message",
            )

    def prompt(self) -> ChatPrompt:
        """The conversation with its tools."""
        choice = self.tool_choice
        return ChatPrompt(
            [message.turn(place) for place, message in enumerate(self.messages)],
            tools=[tool.for_template() for tool in self.tools or ()],
            tool_choice="named" if isinstance(choice, NamedTool) else choice or "auto",
            tool_name=choice.function.name if isinstance(choice, NamedTool) else "",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
        )

    def raw_requests(self, request_id: str, deadline_s: float | None) -> list[RawRequest]:
        """The one request."""
        new_name = self.max_completion_tokens is not None
        names = {
            **NAMES, "num_logprobs": "top_logprobs", "num_prompt_logprobs": "prompt_logprobs", "prompt": "messages",
        }  # fmt: skip
        return [
            self.make_raw(
                self.prompt(),
                request_id,
                deadline_s,
                operation="chat",
                seed=self.seed,
                max_tokens=self.max_completion_tokens if new_name else self.max_tokens,
                num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                num_prompt_logprobs=self.prompt_logprobs,
                names={**names, "max_tokens": "max_completion_tokens"} if new_name else names,
            )
        ]
