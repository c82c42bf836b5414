"""Tokenizers: the three kinds of files, ids out of range, and files that are not what they should be."""

from __future__ import annotations

import json
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokenizer import Tokenizer, load_tokenizer
from stageline.errors import CheckpointError, InvalidArgumentError
from tests.unit.tokenizer_helpers import TEMPLATE, TEXT, train, write_folder, write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    """The gateway's event loop goes on beside the thread that has a text of megabytes."""
    text = "hello world, how are you? " * 100_000
    begun, turns = threading.Event(), 0

    def encode() -> None:
        begun.set()
        tokenizer.encode(text)

    thread = threading.Thread(target=encode)
    thread.start()
    begun.wait()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20, "the tokenizer held the GIL"


def test_properties_of_a_folder(tokenizer: Tokenizer) -> None:
    first = len(train()[0])
    assert tokenizer.vocab_size == first + 4 == tokenizer.num_ids
    assert tokenizer.special_ids == {first, first + 1, first + 2}
    assert tokenizer.eos_token_ids == (first + 2,)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.chat_template == TEMPLATE


def test_text_comes_back_composed(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "café"
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")


@given(st.text())
@settings(max_examples=200)
def test_normalized_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_special_tokens_in_the_text_are_recognized(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "<|im_start|>") == [b"<|im_start|>"]
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b<tool_call>")) == "ab<tool_call>"
    assert tokenizer.encode("") == ()


def test_two_pre_tokenizers_differ_where_they_should(tmp_path: Path, tokenizer: Tokenizer) -> None:
    qwen2 = load_tokenizer(write_gguf(tmp_path / "q.gguf", pre="qwen2"))
    smollm = load_tokenizer(write_gguf(tmp_path / "s.gguf", pre="smollm"))
    assert qwen2.encode(TEXT) == tokenizer.encode(TEXT)
    assert (qwen2.eos_token_ids, qwen2.special_ids) == (tokenizer.eos_token_ids, tokenizer.special_ids)
    assert qwen2.chat_template == TEMPLATE
    assert smollm.decode(smollm.encode("cafe\u0301")) == "cafe\u0301"  # no normalization

    def words(t: Tokenizer, text: str) -> list[str]:
        return [piece for piece, _ in t._backend.pre_tokenizer.pre_tokenize_str(text)]

    # smollm cuts at digits first, so the space stays alone; the contraction is matched in lower case only, and a word
    # takes a space but no other character with it.
    assert words(smollm, "a 12 I'LL\n(b") == ["a", "Ġ", "1", "2", "ĠI", "'", "LL", "Ċ", "(", "b"]
    assert words(qwen2, "a 12 I'LL\n(b") == ["a", "Ġ", "1", "2", "ĠI", "'LL", "Ċ", "(b"]


@pytest.mark.parametrize(("pre", "model"), [("llama-bpe", "gpt2"), ("", "gpt2"), ("qwen2", "llama")])
def test_another_gguf_tokenizer_is_refused_by_name(tmp_path: Path, pre: str, model: str) -> None:
    with pytest.raises(CheckpointError, match=f"{model!r} with pre-tokenizer {pre!r}") as caught:
        load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre, model=model))
    assert caught.value.reason == "TOKENIZER_NOT_SERVED"


def test_tokenizer_json_is_the_same_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    other = load_tokenizer(tmp_path)
    assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert other.special_ids == tokenizer.special_ids
    assert other.eos_token_ids == ()
    assert other.chat_template is None


def test_truncation_and_padding_of_tokenizer_json_are_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = json.loads(tokenizer._backend.to_str())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)


def test_a_decoder_that_is_not_byte_level_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = json.loads(tokenizer._backend.to_str())
    data["decoder"] = {"type": "ByteFallback"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="decoder ByteFallback is not served"):
        load_tokenizer(tmp_path)


def test_ids_that_only_the_embedding_has_stand_for_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 1024}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size < tokenizer.num_ids == 1024
    assert tokenizer.token_bytes(1023) == b""
    assert tokenizer.decode([1023, *tokenizer.encode("a")]) == "a"
    with pytest.raises(InvalidArgumentError, match=r"token id 1024 is out of range; ids are in \[0, 1024\)"):
        tokenizer.decode([1024])


@pytest.mark.parametrize("token_id", [-1, 100_000])
def test_an_id_out_of_range(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(InvalidArgumentError, match="out of range") as caught:
        tokenizer.decode([0, token_id])
    assert caught.value.reason == "TOKEN_ID_OUT_OF_RANGE"
    assert caught.value.metadata["value"] == str(token_id)


def test_a_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="lone surrogate at character 2") as caught:
        tokenizer.encode("ab\ud800")
    assert caught.value.reason == "TEXT_NOT_UNICODE"


def test_chat_template_file_comes_first(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "file"


def test_the_default_of_several_chat_templates(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}])
    assert load_tokenizer(tmp_path).chat_template == "d"


@pytest.mark.parametrize("text", ["<｜end▁of▁turn｜>", "语", "a b", "é!"])
def test_added_tokens_that_are_not_ascii_decode_as_the_library_has_it(tmp_path: Path, text: str) -> None:
    first = len(train()[0])
    write_folder(tmp_path, added_tokens_decoder={str(first): {"content": text, "special": False, "normalized": False}})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == (first,)
    ids = [0, first, first]
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=False)
    # Characters that the byte alphabet has (here é) are bytes, also in an added token: transformers shows U+FFFD too.
    assert tokenizer.token_bytes(first) == (b"\xe9!" if text == "é!" else text.encode())


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.reason == "TOKENIZER_MISSING"


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_missing(tmp_path: Path, name: str) -> None:
    (write_folder(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match="expected"):
        load_tokenizer(tmp_path)


def test_another_class_with_the_same_files_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(CheckpointError, match=r"GPT2Tokenizer are not served.*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b"{"),
        ("vocab.json", b"[]"),
        ("vocab.json", b'{"a": "b"}'),
        ("merges.txt", b"a b c\n"),
        ("merges.txt", b"a\n"),
        ("merges.txt", b"zz yy\n"),
        ("merges.txt", b"\xff \xfe\n"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": "<|clash|>"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (write_folder(tmp_path) / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.reason == "TOKENIZER_UNREADABLE"
    assert str(tmp_path) in caught.value.message
