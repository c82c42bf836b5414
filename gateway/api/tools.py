"""Tool calls in the text of an answer, as Qwen2 writes them (the Hermes form): JSON between <tool_call> tags.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

The parser works on text as it comes, so a streamed answer and a whole one give the same calls. What is no call is
content: nothing the model wrote outside a call is lost, but the white space around calls.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

from gateway.grammar.constraint import CLOSE, OPEN
from gateway.types import ToolCallDelta


def new_call_id() -> str:
    """As OpenAI's: `call_` and 24 characters."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCallParser:
    """Text of one choice in, content and pieces of calls out."""

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self._make_id = make_id
        self._held = ""  # white space or a beginning of OPEN that may belong to a call
        self._call: _Call | None = None
        self.num_calls = 0

    def append(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Content that is sure to be content, and what is new of the calls."""
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        while text:
            if self._call is None:
                before, text = self._until_open(text)
                content.append(before)
            else:
                text = self._in_call(text, content, deltas)
        return "".join(content), deltas

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """What waited. A call that never told its name and arguments is content."""
        rest, self._held = self._held, ""
        if self._call is not None:
            rest += "" if self._call.announced else OPEN + self._call.raw
            self._call = None
        elif self.num_calls and not rest.strip():
            rest = ""
        return rest, []

    def _until_open(self, text: str) -> tuple[str, str]:
        """Content before the next call, and the text after its opening tag ("" where there is none yet)."""
        buffer, self._held = self._held + text, ""
        place = buffer.find(OPEN)
        if place >= 0:
            self._call = _Call()
            return buffer[:place].rstrip(), buffer[place + len(OPEN) :]
        size = next((n for n in range(min(len(OPEN) - 1, len(buffer)), 0, -1) if buffer.endswith(OPEN[:n])), 0)
        sure = buffer[: len(buffer) - size].rstrip()
        self._held = buffer[len(sure) :]
        return sure, ""

    def _in_call(self, text: str, content: list[str], deltas: list[ToolCallDelta]) -> str:
        """Feed the call; returns the text after it ("" while it is open)."""
        call = self._call
        assert call is not None
        announced = call.announced
        rest, arguments = call.append(text)
        if call.announced and not announced:
            deltas.append(ToolCallDelta(self.num_calls, arguments, self._make_id(), call.name))
            self.num_calls += 1
        elif arguments:
            deltas.append(ToolCallDelta(self.num_calls - 1, arguments))
        if call.malformed:
            content.append(OPEN)
            self._call = None
            return call.raw + rest
        if call.closed:
            self._call = None
        return rest


class _Call:
    """One call between its tags, character by character. Arguments come out as the model wrote them.

    `announced`: name known and arguments begun. `malformed`: can be no call any more, and was not announced.
    """

    def __init__(self) -> None:
        self.raw, self.name = "", ""
        self.announced = self.malformed = self.closed = False
        self._state: Callable[[str], None] = self._before
        self._key: str | None = None
        self._value = ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self._waiting_arguments = ""  # arguments that came before the name
        self._out: list[str] = []
        self._tail = ""

    def append(self, text: str) -> tuple[str, str]:
        """(text after the call, new text of the arguments)."""
        self._out = []
        for place, char in enumerate(text):
            self.raw += char
            self._state(char)
            if self.malformed or self.closed:
                return text[place + 1 :], "".join(self._out)
        return "", "".join(self._out)

    def _before(self, char: str) -> None:
        if char == "{":
            self._state = self._between
        elif not char.isspace():
            self.malformed = True

    def _between(self, char: str) -> None:
        """Where a key may begin."""
        if char == '"':
            self._begin_value(char, self._in_key)
        elif char == "}":
            self._end_object()
        elif not char.isspace() and char != ",":
            self._fault()

    def _in_key(self, char: str) -> None:
        self._value += char
        if self._string_ends(char):
            self._key = _text_of(self._value)
            self._state = self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._value_begins
        elif not char.isspace():
            self._fault()

    def _value_begins(self, char: str) -> None:
        if char.isspace():
            return
        if (self._key == "name" and char != '"') or (self._key == "arguments" and char != "{"):
            self._fault()
            return
        streams = self._key == "arguments" and self.name != "" and not self.announced
        self._begin_value(char, self._in_arguments if streams else self._in_value)
        if streams:
            self.announced = True
            self._out.append(char)

    def _in_arguments(self, char: str) -> None:
        self._out.append(char)
        if self._value_ends(char):
            self._state = self._between

    def _in_value(self, char: str) -> None:
        if self._depth == 0 and not self._in_string and char in ",}":  # after a number, true, false, null
            self._end_value()
            self._state(char)
            return
        self._value += char
        if self._value_ends(char):
            self._end_value()

    def _end_value(self) -> None:
        self._state = self._between
        if self._key == "name":
            self.name = _text_of(self._value) or ""
            if not self.name:
                self._fault()
        elif self._key == "arguments":
            self._waiting_arguments = self._value

    def _end_object(self) -> None:
        if not self.name:
            self._fault()
            return
        if not self.announced:
            self.announced = True
            self._out.append(self._waiting_arguments or "{}")
        self._state = self._after

    def _after(self, char: str) -> None:
        """Until the closing tag; what stands between is no text of the answer."""
        self._tail = (self._tail + char)[-len(CLOSE) :]
        self.closed = self._tail == CLOSE

    def _fault(self) -> None:
        """No JSON any more. Before the call was announced it is content; later its arguments stand as they are."""
        if self.announced:
            self._state = self._after
            self._after(self.raw[-1])
        else:
            self.malformed = True

    def _begin_value(self, char: str, state: Callable[[str], None]) -> None:
        self._value, self._state, self._escaped = char, state, False
        self._in_string = char == '"'
        self._depth = 1 if char in "{[" else 0

    def _string_ends(self, char: str) -> bool:
        """Within a string: whether this character closes it."""
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            return True
        return False

    def _value_ends(self, char: str) -> bool:
        if self._in_string:
            return self._string_ends(char) and self._depth == 0
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def _text_of(raw: str) -> str | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
