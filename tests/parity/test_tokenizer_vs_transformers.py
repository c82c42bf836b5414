"""Tokenizers, incremental text and chat templates against transformers."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from gateway.tokenizer import Detokenizer, Tokenizer, load_chat_template, load_tokenizer
from tests.unit.tokenizer_helpers import TEXT, write_folder, write_gguf

transformers = pytest.importorskip("transformers")

NAMES = ["tiny", "qwen-coder", "smollm2"]
ALPHABETS = [  # (first, last) code points of random texts
    (0x00, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF),
    (0x2000, 0x206F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFFFF),
    (0x1F000, 0x1FAFF), (0xE0000, 0xE01FF),
]  # fmt: skip
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi <b>é</b> 🎉"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "hi\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c <|im_end|>"},
    ],
    [{"role": "user", "content": ""}],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Wetter für <Ort>", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}}}}]  # fmt: skip
TOOL_CONVERSATION = [
    {"role": "user", "content": "weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}]},
    {"role": "tool", "content": "12 °C"},
    {"role": "tool", "content": "rain"},
]  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def pair(
    request: pytest.FixtureRequest, model_folder: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    """Ours and transformers', from the same folder."""
    if request.param == "tiny":
        folder = write_folder(tmp_path_factory.mktemp("tiny"))
        return load_tokenizer(folder), transformers.Qwen2Tokenizer.from_pretrained(folder)
    folder = model_folder(request.param)
    reference = with_added_tokens_in_vocab(folder, tmp_path_factory.mktemp(request.param))
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(reference)


def with_added_tokens_in_vocab(folder: Path, copy: Path) -> Path:
    """A copy of the tokenizer's files with the added tokens in vocab.json, at the ids that the checkpoint declares.

    transformers numbers added tokens after the last vocabulary entry, whatever `added_tokens_decoder` says. Where they
    are declared below it (SmolLM2: 0 to 16, with a vocab.json that starts at 17), they would take the ids of ordinary
    tokens, and the model, whose config says eos_token_id 2, would never see its own.
    """
    for name in ("merges.txt", "tokenizer_config.json", "config.json"):
        shutil.copy(folder / name, copy)
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= {entry["content"]: int(token_id) for token_id, entry in added.items()}
    (copy / "vocab.json").write_text(json.dumps(vocab))
    return copy


def random_texts(count: int) -> list[str]:
    rng = random.Random(20)
    texts = []
    for _ in range(count):
        chars = [chr(rng.randint(*rng.choice(ALPHABETS))) for _ in range(rng.randint(1, 60))]
        pieces = [rng.choice([char, char, char, " ", "\n", "  \t", "1", "'s", "<|im_start|>"]) for char in chars]
        texts.append("".join(pieces))
    return texts


def assert_same_ids(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert list(ids) == theirs(text)["input_ids"], repr(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), repr(text)


def test_the_multilingual_text(pair: tuple[Tokenizer, Any]) -> None:
    assert_same_ids(*pair, TEXT)


def test_random_texts(pair: tuple[Tokenizer, Any]) -> None:
    for text in random_texts(400):
        assert_same_ids(*pair, text)


def test_sizes_and_special_tokens(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert ours.special_tokens["eos_token"] == theirs.eos_token


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_piece_by_piece(pair: tuple[Tokenizer, Any], skip: bool) -> None:
    ours, theirs = pair
    rng = random.Random(21)
    for _ in range(500):
        ids = [rng.randrange(rng.choice([256, ours.vocab_size])) for _ in range(rng.randint(1, 20))]
        detokenizer = Detokenizer(ours, skip)
        text = "".join([detokenizer.append(i) for i in ids] + [detokenizer.finish()])
        assert text == theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_text(pair: tuple[Tokenizer, Any], messages: list[dict[str, Any]]) -> None:
    ours, theirs = pair
    template = load_chat_template(ours)
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        text = template.render(messages, **options)
        assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
        assert list(ours.encode(text)) == theirs.apply_chat_template(
            messages, tokenize=True, return_dict=False, **options
        )
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_chat_text_with_tools(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    template = load_chat_template(ours)
    for messages in (*CONVERSATIONS, TOOL_CONVERSATION):
        expected = theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
        assert template.render(messages, tools=TOOLS) == expected


def test_a_tokenizer_json_that_transformers_wrote(pair: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    other = load_tokenizer(tmp_path)
    assert (other.special_ids, other.eos_token_ids) == (ours.special_ids, ours.eos_token_ids)
    assert other.chat_template == ours.chat_template
    for text in (TEXT, *random_texts(50)):
        assert other.encode(text) == ours.encode(text), repr(text)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {}, "eos_token": "<|endoftext|>"},
        {"added_tokens_decoder": {}, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"split_special_tokens": True},
        {"eos_token": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                       "single_word": False, "__type": "AddedToken"}},
    ],
    ids=["defaults", "additional", "split", "object"],
)  # fmt: skip
def test_special_tokens_from_odd_configurations(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_folder(tmp_path, **config)
    ours, theirs = load_tokenizer(folder), transformers.Qwen2Tokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert list(ours.encode(TEXT)) == theirs(TEXT)["input_ids"]


def test_gguf_metadata(tmp_path: Path) -> None:
    # transformers normalizes nothing here, though Qwen2's own tokenizer does: compared on text that is composed already.
    path = write_gguf(tmp_path / "model.gguf", pre="qwen2")
    ours, theirs = (
        load_tokenizer(path),
        transformers.PreTrainedTokenizerFast(name_or_path=str(tmp_path), gguf_file=path.name),
    )
    for text in (TEXT, *random_texts(100)):
        composed = unicodedata.normalize("NFC", text)
        assert list(ours.encode(composed)) == theirs(composed, add_special_tokens=False)["input_ids"], repr(composed)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}


def test_gguf_metadata_of_smollm(tmp_path: Path) -> None:
    # transformers does not know this pre-tokenizer and leaves GPT-2's: the same but for runs of digits.
    path = write_gguf(tmp_path / "model.gguf", pre="smollm")
    ours, theirs = (
        load_tokenizer(path),
        transformers.PreTrainedTokenizerFast(name_or_path=str(tmp_path), gguf_file=path.name),
    )
    for text in (TEXT, *random_texts(100)):
        without = "".join(char for char in text if not char.isnumeric())
        assert list(ours.encode(without)) == theirs(without, add_special_tokens=False)["input_ids"], repr(without)
