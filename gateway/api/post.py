"""What happens to deltas between the engine and a door: the echo before them, the tool calls in them."""

from __future__ import annotations

from dataclasses import replace

from gateway.api.tools import ToolCallParser
from gateway.types import ChoiceDelta, FinishReason


class PostProcessor:
    """For one request; remembers what each choice has already had."""

    def __init__(self, *, echo: str, parse_tools: bool) -> None:
        self._echo, self._parse_tools = echo, parse_tools
        self._echoed: set[int] = set()
        self._parsers: dict[int, ToolCallParser] = {}

    def resume(self, index: int, text: str) -> None:
        """The client has `text` of a choice already, and its echo."""
        self._echoed.add(index)
        if self._parse_tools:
            self._parsers.setdefault(index, ToolCallParser()).append(text)

    def apply(self, delta: ChoiceDelta) -> ChoiceDelta:
        """The delta as the client gets it."""
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
