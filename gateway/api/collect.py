"""A whole answer out of its deltas, and which of several choices come back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from gateway.types import ChoiceDelta, FinishReason, TokenLogprobs, ToolCallDelta


@dataclass(frozen=True, slots=True)
class Answer:
    """One delta a choice, in order of index. `completion_tokens` counts what was generated, returned or not,
    `cached_prompt_tokens` those of the prompt that no choice had to compute."""

    choices: list[ChoiceDelta]
    completion_tokens: int
    cached_prompt_tokens: int


async def collect(deltas: AsyncIterator[ChoiceDelta], num_returned: int, *, show_logprobs: bool) -> Answer:
    """Put deltas together; where more choices came than are returned, the most probable ones, numbered anew.

    The rank is OpenAI's for best_of: the mean log-probability of a choice's tokens.
    """
    collected: dict[int, _Collected] = {}
    async for delta in deltas:
        collected.setdefault(delta.index, _Collected()).add(delta)
    tokens = sum(len(choice.token_ids) for choice in collected.values())
    choices = [collected[index].whole(index) for index in sorted(collected)]
    if len(choices) > num_returned:
        best = sorted(choices, key=_mean_logprob, reverse=True)[:num_returned]
        choices = [replace(choice, index=place) for place, choice in enumerate(best)]
    if not show_logprobs:
        choices = [replace(choice, logprobs=()) for choice in choices]
    return Answer(choices, tokens, min((one.cached_prompt_tokens for one in collected.values()), default=0))


def _mean_logprob(choice: ChoiceDelta) -> float:
    return sum(entry.logprob for entry in choice.logprobs) / max(1, len(choice.logprobs))


@dataclass(slots=True)
class _Collected:
    """Deltas of one choice, put together."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: dict[int, list[ToolCallDelta]] = field(default_factory=dict)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    matched_stop: str = ""
    cached_prompt_tokens: int = 0

    def add(self, delta: ChoiceDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        for call in delta.tool_calls:
            self.calls.setdefault(call.index, []).append(call)
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
            prompt_logprobs=self.prompt_logprobs,
            tool_calls=tuple(
                replace(parts[0], arguments="".join(part.arguments for part in parts)) for parts in self.calls.values()
            ),
        )
