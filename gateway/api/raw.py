"""Requests as the doors read them: types are right, values are unchecked, None is "not given"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.grammar import Constraint


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; special tokens written in it are recognized."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered with the model's chat template.

    `messages` are mappings with `role` and `content` (which may be missing beside `tool_calls`), `tools` OpenAI's tool
    objects. `tool_choice` is "auto", "none", "required" or the name of a function with `tool_name`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    tool_name: str = ""
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RawResume:
    """What a client says it already has of one choice."""

    token_ids: Sequence[int]
    model_fingerprint: str
    seed: int
    choice_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRequest:
    """One generation as a client asked for it.

    `default_max_tokens` is what the door promises where `max_tokens` is not given; None is what is left of the context.
    `deadline_s` is on the time.monotonic clock. `names` maps our field names to the ones this door's clients write, so
    that an error names what they typed. `operation` is the call's name in OpenTelemetry's GenAI conventions.
    """

    prompt: Prompt | None
    operation: str = "generate_content"
    model: str | None = None
    request_id: str = ""
    num_choices: int | None = None
    best_of: int | None = None
    echo: bool = False
    constraint: Constraint | None = None
    priority: int | None = None
    deadline_s: float | None = None
    resume: RawResume | None = None
    default_max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    include_stop_string: bool | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
