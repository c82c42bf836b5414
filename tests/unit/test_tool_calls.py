"""Tool calls in text: what is a call, what stays content, and that the cut of the stream does not matter."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.tools import ToolCallParser


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def parse(pieces) -> tuple[str, list[tuple[str, str, str]]]:
    """Content, and (id, name, arguments) of each call."""
    ids = iter("abcdefgh")
    parser = ToolCallParser(lambda: next(ids))
    content, calls = "", []
    for text, deltas in [*map(parser.append, pieces), parser.finish()]:
        content += text
        for delta in deltas:
            if delta.id:
                assert delta.index == len(calls)
                calls.append([delta.id, delta.name, ""])
            calls[delta.index][2] += delta.arguments
    assert parser.num_calls == len(calls)
    return content, [tuple(one) for one in calls]


WEATHER = call("weather", {"city": "Paris"})
CASES = [
    ("no call at all \n ", "no call at all \n ", []),
    (WEATHER, "", [("a", "weather", '{"city": "Paris"}')]),
    (f"I look.\n{WEATHER}\n{call('time', {})}\n", "I look.", [("a", "weather", '{"city": "Paris"}'), ("b", "time", "{}")]),
    (f"{WEATHER}\nDone.", "\nDone.", [("a", "weather", '{"city": "Paris"}')]),
    # A string may hold anything, the closing tag and braces too.
    (call("say", {"t": '}"</tool_call>{\\'}), "", [("a", "say", json.dumps({"t": '}"</tool_call>{\\'}))]),
    ('<tool_call>{"arguments": {"x": [1, {}]}, "name": "late"}</tool_call>', "", [("a", "late", '{"x": [1, {}]}')]),
    ('<tool_call>{"name": "none"}</tool_call>', "", [("a", "none", "{}")]),
    ('<tool_call>{"name": "n", "id": 3, "ok": true, "arguments": {}}</tool_call>', "", [("a", "n", "{}")]),
    # Small models forget a brace: the arguments are complete.
    ('<tool_call>{"name": "n", "arguments": {"a": 1}</tool_call> x', " x", [("a", "n", '{"a": 1}')]),
    # No call can come of these, so they are content, whole.
    ("<tool_call>weather(Paris)</tool_call>", "<tool_call>weather(Paris)</tool_call>", []),
    ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    ('<tool_call>{"name": "n", "arguments": "x"}</tool_call>', '<tool_call>{"name": "n", "arguments": "x"}</tool_call>', []),
    ('<tool_call>{"name": "n"', '<tool_call>{"name": "n"', []),
    (f"<tool_call>oops {WEATHER}", "<tool_call>oops", [("a", "weather", '{"city": "Paris"}')]),
    ("a <tool_cal", "a <tool_cal", []),
    # Cut off by max_tokens within the arguments: they stand as far as they came.
    ('<tool_call>{"name": "n", "arguments": {"a": 1, ', "", [("a", "n", '{"a": 1, ')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_whole_and_in_single_characters(text, content, calls):
    assert parse([text]) == (content, calls)
    assert parse(text) == (content, calls)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 200)))
def test_the_cut_does_not_matter(case, cuts):
    text, content, calls = case
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert parse([text[a:b] for a, b in pairwise(edges)]) == (content, calls)


@given(st.text(alphabet='<tol_ca>/{}":, \\ne\n', max_size=60))
def test_any_text_is_taken_and_nothing_outside_calls_is_lost(text):
    content, calls = parse([text])
    assert parse(text) == (content, calls)
    if not calls:
        assert content == text


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)))
def test_arguments_come_out_as_they_were_written(arguments):
    content, [(_, name, written)] = parse(call("f", arguments))
    assert (content, name, json.loads(written)) == ("", "f", arguments)


def test_arguments_stream_as_they_come():
    parser = ToolCallParser(lambda: "id")
    assert parser.append('<tool_call>\n{"name": "f", "argum') == ("", [])
    _, [first] = parser.append('ents": {"a"')
    assert (first.id, first.name, first.arguments) == ("id", "f", '{"a"')
    _, [more] = parser.append(": 1}")
    assert (more.id, more.name, more.arguments) == ("", "", ": 1}")
