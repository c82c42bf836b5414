"""What happens to deltas between the engine and a door: the prompt before them, the tool calls in
them."""

from __future__ import annotations

from dataclasses import replace

from gateway.api.tools import ToolCallParser
from gateway.types import ChoiceDelta, FinishReason, TokenLogprobs


class PostProcessor:
    """For one request; remembers what each choice has already had."""

    def __init__(self, *, echo: str, parse_tools: bool, scored_by: int | None = None) -> None:
        """`scored_by`: the choice whose first delta has the log-probabilities of the prompt, None where nobody asked."""
        self._echo, self._parse_tools, self._scored_by = echo, parse_tools, scored_by
        self._scores: tuple[TokenLogprobs, ...] | None = None
        self._held: list[ChoiceDelta] = []
        self._begun: set[int] = set()
        self._echoed: set[int] = set()
        self._parsers: dict[int, ToolCallParser] = {}

    def resume(self, index: int, text: str) -> None:
        """The client has `text` of a choice already, and its echo."""
        self._echoed.add(index)
        if self._parse_tools:
            self._parsers.setdefault(index, ToolCallParser()).append(text)

    def apply(self, delta: ChoiceDelta) -> list[ChoiceDelta]:
        """The deltas that the client gets now. Those of other choices wait until the prompt is scored: all have that."""
        if self._scored_by is None:
            return [self._apply(delta)]
        if self._scores is None and delta.index != self._scored_by:
            self._held.append(delta)
            return []
        if self._scores is None:
            self._scores = delta.prompt_logprobs
        deltas, self._held = [delta, *self._held], []
        return [self._apply(self._with_scores(one)) for one in deltas]

    def _with_scores(self, delta: ChoiceDelta) -> ChoiceDelta:
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        return replace(delta, prompt_logprobs=self._scores) if first else delta

    def _apply(self, delta: ChoiceDelta) -> ChoiceDelta:
        if self._parse_tools:
            delta = self._parsed(delta)
        if self._echo and delta.index not in self._echoed:
            self._echoed.add(delta.index)
            delta = replace(delta, text=self._echo + delta.text)
        return delta

    def _parsed(self, delta: ChoiceDelta) -> ChoiceDelta:
        parser = self._parsers.setdefault(delta.index, ToolCallParser())
        text, calls = parser.append(delta.text)
        reason = delta.finish_reason
        if reason is not None:
            rest, last = parser.finish()
            text, calls = text + rest, calls + last
            if reason is FinishReason.STOP and parser.num_calls:
                reason = FinishReason.TOOL_CALLS
        return replace(delta, text=text, tool_calls=tuple(calls), finish_reason=reason)
