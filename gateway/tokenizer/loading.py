"""Tokenizers from `tokenizer.json`, from Qwen2's `vocab.json` + `merges.txt`, or from GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import tokenizers
from tokenizers import AddedToken

from gateway.tokenizer.byte_level_bpe import build_byte_level_bpe, unreadable
from gateway.tokenizer.tokenizer import Tokenizer
from stageline.errors import CheckpointError
from stages.gguf_container import read_gguf
from stages.gguf_file import read_gguf_tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# What transformers' Qwen2Tokenizer assumes where tokenizer_config.json does not say.
_QWEN2_NAMED = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


def load_tokenizer(path: Path) -> Tokenizer:
    """From a folder in the Hugging Face layout or a .gguf file.

    Raises CheckpointError: TOKENIZER_MISSING (says which files were expected), TOKENIZER_UNREADABLE,
    TOKENIZER_NOT_SERVED (another kind of tokenizer, by name), and those of `stages.gguf_container.read_gguf`.
    """
    if path.is_file():
        return _from_gguf(path)
    config = _read_json_object(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        backend, named = _from_tokenizer_json(path / "tokenizer.json"), config
    else:
        backend, named = _from_vocab_and_merges(path, config), {**_QWEN2_NAMED, **config}
    special_tokens = {name: text for name in _NAMED if (text := _content(named.get(name))) is not None}
    extra = [_content(entry) for entry in named.get("additional_special_tokens") or ()]
    special = [*special_tokens.values(), *(text for text in extra if text is not None)]
    # Those that already have an id keep it.
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    model_config = _read_json_object(path / "config.json")
    return Tokenizer(
        backend,
        chat_template=_chat_template(path, config),
        special_tokens=special_tokens,
        eos_token_ids=_ids(backend, special_tokens.get("eos_token")),
        model_vocab_size=int(model_config.get("vocab_size") or 0),
    )


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise unreadable(path, error) from None
    # Token by token decoding (see Detokenizer) holds for byte-level decoders only.
    kind = type(backend.decoder).__name__
    if kind != "ByteLevel":
        raise CheckpointError(
            "TOKENIZER_NOT_SERVED", f"{path}: decoder {kind} is not served; expected ByteLevel, which Qwen2 has",
            path=path, decoder=kind,
        )  # fmt: skip
    backend.no_padding()
    backend.no_truncation()
    return backend


def _from_vocab_and_merges(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab_file, merges_file = path / "vocab.json", path / "merges.txt"
    if not (vocab_file.is_file() and merges_file.is_file()):
        raise CheckpointError(
            "TOKENIZER_MISSING",
            f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt",
            path=path,
        )
    named_class = str(config.get("tokenizer_class") or "Qwen2Tokenizer")
    if named_class.removesuffix("Fast") != "Qwen2Tokenizer":
        raise CheckpointError(
            "TOKENIZER_NOT_SERVED", f"{path}: vocab.json and merges.txt of {named_class} are not served, only Qwen2Tokenizer's; "
            "add its tokenizer.json", path=path, tokenizer_class=named_class,
        )  # fmt: skip
    try:
        added = {int(i): AddedToken(**entry) for i, entry in config.get("added_tokens_decoder", {}).items()}
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except (TypeError, AttributeError, ValueError) as error:
        raise unreadable(path, error) from None
    return build_byte_level_bpe(
        kind="qwen2",
        vocab=_read_json_object(vocab_file),
        merges=[line for line in lines if line and not line.startswith("#version")],
        added=added,
        source=path,
    )


def _from_gguf(path: Path) -> Tokenizer:
    data = read_gguf_tokenizer(path)
    if data.model != "gpt2" or data.pre not in ("qwen2", "smollm"):
        raise CheckpointError(
            "TOKENIZER_NOT_SERVED",
            f"{path}: tokenizer model {data.model!r} with pre-tokenizer {data.pre!r} is not served; expected 'gpt2' with "
            "'qwen2' or 'smollm'",
            path=path, model=data.model, pre=data.pre,
        )  # fmt: skip
    kinds = dict(enumerate(data.token_types))
    try:
        added = {
            i: AddedToken(data.tokens[i], normalized=False, special=kind == _CONTROL)
            for i, kind in kinds.items()
            if kind in (_CONTROL, _USER_DEFINED)
        }
    except (TypeError, ValueError) as error:  # not a string, or not UTF-8
        raise unreadable(path, error) from None
    backend = build_byte_level_bpe(
        kind=cast("Literal['qwen2', 'smollm']", data.pre),
        vocab={token: i for i, token in enumerate(data.tokens)},
        merges=data.merges,
        added=added,
        source=path,
    )
    named = {"bos_token": data.bos_token_id, "eos_token": data.eos_token_id}
    special_tokens = {name: text for name, i in named.items() if i is not None and (text := backend.id_to_token(i))}
    embedding = read_gguf(path).tensors.get("token_embd.weight")
    return Tokenizer(
        backend,
        chat_template=data.chat_template,
        special_tokens=special_tokens,
        eos_token_ids=_ids(backend, special_tokens.get("eos_token")),
        model_vocab_size=embedding.shape[0] if embedding is not None else 0,
    )


def _ids(backend: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    token_id = backend.token_to_id(token) if token is not None else None
    return () if token_id is None else (token_id,)


def _content(token: Any) -> str | None:
    """The text of a named token, written as a string or as an object with `content`; None where it is null."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, TypeError, KeyError) as error:
        raise unreadable(file if file.is_file() else path / "tokenizer_config.json", error) from None
    return template if isinstance(template, str) else None


def _read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    if not isinstance(value, dict):
        raise unreadable(path, "not a JSON object")
    return value
