"""Incremental decoding and stop strings against decoding and searching the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokenizer import Detokenizer, StopMatcher, Tokenizer, load_tokenizer
from stageline.errors import InvalidArgumentError
from tests.unit.tokenizer_helpers import TEXT, write_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=300)
def test_pieces_make_the_whole(tokenizer: Tokenizer, skip: bool, data: st.DataObject) -> None:
    # Ids below 256 are single bytes: most sequences hold broken characters.
    one = st.integers(0, 255) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(one, max_size=30))
    detokenizer = Detokenizer(tokenizer, skip)
    text = "".join([detokenizer.append(i) for i in ids] + [detokenizer.finish()])
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert text == tokenizer._backend.decode(ids, skip_special_tokens=skip)


def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    of_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    assert [detokenizer.append(of_byte[bytes([byte])]) for byte in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]
    assert detokenizer.append(of_byte[b"\xf0"]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_real_text_has_no_replacement_characters(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.append(i) for i in tokenizer.encode(TEXT)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.finish() == ""


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.eos_token_ids
    assert Detokenizer(tokenizer).append(end) == ""
    assert Detokenizer(tokenizer, skip_special_tokens=False).append(end) == "<|im_end|>"


def test_an_id_out_of_range(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="out of range"):
        Detokenizer(tokenizer).append(-1)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop string complete first, the longest of those, by trying every end."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


few = st.text(alphabet="ab", min_size=1, max_size=5)


@given(text=st.text(alphabet="ab", max_size=40), stops=st.lists(few, max_size=4), cuts=st.sets(st.integers(0, 40)),
       include=st.booleans())  # fmt: skip
@settings(max_examples=1000)
def test_stops_as_a_search_of_the_whole_finds_them(text: str, stops: list[str], cuts: set[int], include: bool) -> None:
    expected = naive(text, stops, include)
    matcher, sent, matched = StopMatcher(stops, include), "", None
    for begin, end in pairwise(sorted({0, len(text), *(c for c in cuts if c < len(text))})):
        ready, matched = matcher.append(text[begin:end])
        sent += ready
        assert expected[0].startswith(sent)  # nothing is sent that has to be taken back
        # What is held back is needed: it is the beginning of a stop string.
        held = text[len(sent) : end]
        assert matched is not None or not held or any(stop.startswith(held) for stop in stops)
        if matched is not None:
            break
    if matched is None:
        sent += matcher.finish()
    assert (sent, matched) == expected


@given(text=st.text(alphabet="ab", max_size=30), stops=st.lists(few, min_size=1, max_size=3), first=st.integers(0, 30))
@settings(max_examples=500)
def test_stops_complete_too_early_do_not_count(text: str, stops: list[str], first: int) -> None:
    early, late = text[:first], text[first:]
    matcher = StopMatcher(stops)
    sent, matched = matcher.append(early, may_stop=False)
    assert matched is None
    ready, matched = matcher.append(late)
    sent += ready if matched is not None else ready + matcher.finish()
    ends = [(e, s) for e in range(len(early) + 1, len(text) + 1) for s in stops if text[:e].endswith(s)]
    if ends:
        end = min(ends)[0]
        stop = max((s for e, s in ends if e == end), key=len)
        assert (matched, sent) == (stop, text[: end - len(stop)])
    else:
        assert (matched, sent) == (None, text)


def test_a_long_stop_string_takes_linear_time() -> None:
    # 20,000 characters, each almost a match: a search that starts again at every character would take 10^8 steps.
    matcher = StopMatcher(["a" * 20_000 + "b"])
    ready, matched = matcher.append("a" * 100_000)
    assert (len(ready), matched) == (80_000, None)
    assert matcher.append("b") == ("", "a" * 20_000 + "b")


def test_an_empty_stop_string() -> None:
    with pytest.raises(InvalidArgumentError, match="empty"):
        StopMatcher(["a", ""])
