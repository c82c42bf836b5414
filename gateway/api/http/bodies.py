"""The bodies of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from gateway.api.checks import draw_seed
from gateway.api.http.schema import NO_OPS, Body, GenerationBody, NoOps
from gateway.api.raw import ChatPrompt, Prompt, RawRequest, TextPrompt, TokenPrompt
from stageline.errors import InvalidArgumentError, UnimplementedError

MAX_PROMPTS = 128
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

_NAMES = {"num_choices": "n", "stop_strings": "stop"}


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    no_ops: ClassVar[NoOps] = {**NO_OPS, "best_of": (1,), "echo": (False,), "suffix": ("",)}
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None

    def raw_requests(self, request_id: str, deadline_s: float | None) -> list[RawRequest]:
        """One for each prompt. The one at place i uses `seed` + i, so that equal prompts get answers of their own.

        Raises InvalidArgumentError for no prompt or too many.
        """
        prompts = self._prompts()
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise InvalidArgumentError(
                "PROMPT_COUNT_OUT_OF_RANGE", f"prompt holds {len(prompts)} prompts, expected 1 to {MAX_PROMPTS}",
                field="prompt", count=len(prompts), limit=MAX_PROMPTS,
            )  # fmt: skip
        seed = draw_seed() if self.seed is None else self.seed
        return [
            self.make_raw(
                prompt,
                request_id if len(prompts) == 1 else f"{request_id}-{place}",
                deadline_s,
                seed=seed if seed < 0 else seed + place,
                max_tokens=self.max_tokens,
                default_max_tokens=COMPLETION_MAX_TOKENS,
                num_logprobs=self.logprobs,
                names={**_NAMES, "num_logprobs": "logprobs"},
            )
            for place, prompt in enumerate(prompts)
        ]

    def _prompts(self) -> list[Prompt]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [TextPrompt(prompt)]
        if prompt and isinstance(prompt[0], int):
            return [TokenPrompt(prompt)]
        return [TextPrompt(one) if isinstance(one, str) else TokenPrompt(one) for one in prompt]  # type: ignore[arg-type]


class ContentPart(Body):
    """A part of a message's content."""

    type: str
    text: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            raise UnimplementedError(
                "CONTENT_NOT_SERVED", f"content of type {data['type'][:64]!r} is not served; send text",
                field="messages.content.type", value=data["type"][:64],
            )  # fmt: skip
        return data


class ChatMessage(Body):
    """One turn. Fields that an answer of ours has and that hold nothing may be sent back with it."""

    no_ops: ClassVar[NoOps] = dict.fromkeys(
        ("name", "refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id", "reasoning_content"),
        ([], ""),
    )
    role: str
    content: str | list[ContentPart]

    def turn(self) -> dict[str, str]:
        """As the chat template takes it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text or "" for part in self.content)}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    no_ops: ClassVar[NoOps] = {
        **NO_OPS,
        "add_generation_prompt": (True,),
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

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

    def raw_requests(self, request_id: str, deadline_s: float | None) -> list[RawRequest]:
        """The one request."""
        new_name = self.max_completion_tokens is not None
        names = {**_NAMES, "num_logprobs": "top_logprobs", "prompt": "messages"}
        return [
            self.make_raw(
                ChatPrompt([message.turn() for message in self.messages]),
                request_id,
                deadline_s,
                seed=self.seed,
                max_tokens=self.max_completion_tokens if new_name else self.max_tokens,
                num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                names={**names, "max_tokens": "max_completion_tokens"} if new_name else names,
            )
        ]
