"""Request bodies of the OpenAI API, with the sampling fields vLLM users send. Unknown fields are refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.api.validate import RawParams
from stageline.errors import InvalidArgumentError, UnimplementedError


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream carries besides text."""

    include_usage: bool = False


class ResponseFormat(_Body):
    """Only plain text is served."""

    type: str


class _Sampling(_Body):
    """What both endpoints take."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def raw(self, max_tokens: int | None, num_logprobs: int | None) -> RawParams:
        """The same fields for validation."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return RawParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's spelling of "all"
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self._bias(),
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_strings=stops,
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=bool(self.ignore_eos),
            include_stop_string=bool(self.include_stop_str_in_output),
            num_logprobs=num_logprobs,
            skip_special_tokens=self.skip_special_tokens is not False,
        )

    def _bias(self) -> dict[int, float]:
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit():
                raise InvalidArgumentError(
                    "TOKEN_ID_OUT_OF_RANGE", f"logit_bias: {key!r} is not a token id", field="logit_bias"
                )
            bias[int(key)] = value
        return bias

    def refuse(self, **accepted: tuple[Any, ...]) -> None:
        """Raise UnimplementedError for a field whose value asks for more than its no-op values."""
        for name, values in accepted.items():
            given = getattr(self, name)
            if given is not None and given not in values:
                raise UnimplementedError("PARAMETER_NOT_SERVED", f"{name} is not served yet; leave it out", field=name)


class CompletionBody(_Sampling):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Refuse by name what is not served."""
        self.refuse(echo=(False,), best_of=(1, self.n), suffix=("",))

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class ContentPart(_Body):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn."""

    role: str
    content: str | list[ContentPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatBody(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Refuse by name what is not served."""
        self.refuse(tools=([],), tool_choice=("none", "auto"), response_format=(ResponseFormat(type="text"),))
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgumentError("LOGPROBS_OFF", "top_logprobs needs logprobs: true", field="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidArgumentError(
                "MAX_TOKENS_TWICE", "give max_completion_tokens or max_tokens, not both", field="max_tokens"
            )

    def num_logprobs(self) -> int | None:
        """Alternatives asked, None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
