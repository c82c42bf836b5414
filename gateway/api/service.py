"""The one generate path behind every door: prompt → token ids → checked request → engine → deltas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol, cast

from gateway.api.checks import check_token_ids
from gateway.api.raw import ChatPrompt, Prompt, RawRequest, TextPrompt
from gateway.api.validate import check_served, validate
from gateway.tokenizer import ChatTemplate, Tokenizer
from gateway.types import (
    ChoiceDelta,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    PipelineStatus,
    ReplicaStatus,
    TokenLogprobs,
)
from stageline.errors import FailedPreconditionError

# Longer texts are tokenized on a thread (the tokenizer releases the GIL), so that they do not hold up the streams.
LONG_TEXT_CHARS = 16_384


class EngineLike(Protocol):
    """What the doors need of the engine."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[ChoiceDelta]:
        """An async generator of deltas; closing it cancels the request."""
        ...

    def ready(self) -> bool:
        """Whether some pipeline can serve."""
        ...

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All pipelines."""
        ...

    def spares(self) -> tuple[ReplicaStatus, ...]:
        """Replicas in no pipeline."""
        ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that passed its door. `created_s`: seconds since the epoch."""

    request: GenerateRequest
    created_s: int


class Frontend:
    """Everything a door calls. Lives on the engine's event loop."""

    def __init__(
        self, engine: EngineLike, tokenizer: Tokenizer, chat_template: ChatTemplate | None, model: ModelInfo
    ) -> None:
        self.engine, self.tokenizer, self.chat_template, self.model = engine, tokenizer, chat_template, model
        self.started_s = int(time.time())

    async def accept(self, raw: RawRequest) -> Accepted:
        """Check and tokenize. Raises what `check_served`, `encode` and `validate` raise."""
        check_served(raw, self.model)
        assert raw.prompt is not None
        token_ids, _ = await self.encode(raw.prompt)
        return Accepted(validate(raw, token_ids, self.model), int(time.time()))

    async def encode(self, prompt: Prompt) -> tuple[tuple[int, ...], str]:
        """Token ids and the text they came from ("" for a prompt of ids).

        Raises FailedPreconditionError without a chat template, and InvalidArgumentError for text that is not Unicode,
        an unknown role, or messages that the template refuses.
        """
        if isinstance(prompt, ChatPrompt):
            text = self._render(prompt)
        elif isinstance(prompt, TextPrompt):
            text = prompt.text
        else:
            return tuple(prompt.token_ids), ""
        if len(text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self.tokenizer.encode, text), text
        return self.tokenizer.encode(text), text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, field: str) -> str:
        """Text of token ids. Raises InvalidArgumentError that names `field` for an id out of range."""
        check_token_ids(token_ids, self.model.vocab_size, field)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def stream(self, accepted: Accepted) -> AsyncGenerator[ChoiceDelta]:
        """Deltas as they come. Close it (aclosing) to cancel the request."""
        # The engine returns an async generator; the protocol of two parts says only what both need.
        deltas = cast("AsyncGenerator[ChoiceDelta]", self.engine.generate(accepted.request))
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def collect(self, accepted: Accepted) -> list[ChoiceDelta]:
        """The whole answer: one delta a choice, in order of index."""
        choices: dict[int, _Collected] = {}
        async with aclosing(self.stream(accepted)) as deltas:
            async for delta in deltas:
                choices.setdefault(delta.index, _Collected()).add(delta)
        return [choices[index].whole(index) for index in sorted(choices)]

    def _render(self, prompt: ChatPrompt) -> str:
        if self.chat_template is None:
            raise FailedPreconditionError(
                "NO_CHAT_TEMPLATE",
                f"model {self.model.name!r} has no chat template; send the prompt as text or token ids",
                field="messages", model=self.model.name,
            )  # fmt: skip
        return self.chat_template.render(prompt.messages)


@dataclass(slots=True)
class _Collected:
    """Deltas of one choice, put together."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str = ""
    cached_prompt_tokens: int = 0

    def add(self, delta: ChoiceDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.matched_stop = delta.matched_stop
        self.cached_prompt_tokens = delta.cached_prompt_tokens

    def whole(self, index: int) -> ChoiceDelta:
        return ChoiceDelta(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
            cached_prompt_tokens=self.cached_prompt_tokens,
        )
