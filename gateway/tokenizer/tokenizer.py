"""Tokenizers from `tokenizer.json`, from Qwen2's `vocab.json` + `merges.txt`, or from GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from stageline.errors import CheckpointError, InvalidArgumentError
from stages.gguf_file import read_gguf_tokenizer

# Qwen2's own pattern (its tokenization_qwen2.py).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types


class Tokenizer:
    """Encodes and decodes; never adds tokens that the text does not have."""

    def __init__(self, backend: tokenizers.Tokenizer, *, special_ids: Iterable[int], chat_template: str | None) -> None:
        self._backend = backend
        self.special_ids = frozenset(special_ids)
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids; special tokens written in the text are recognized. Raises InvalidArgumentError for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                "TEXT_NOT_UNICODE", f"the text holds a lone surrogate at character {error.start}; send valid Unicode",
                field="prompt", position=error.start,
            ) from None  # fmt: skip
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. Raises InvalidArgumentError for an id out of range."""
        data = b"".join(self.token_bytes(i) for i in token_ids if not (skip_special_tokens and i in self.special_ids))
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for ids the model has but the tokenizer does not use."""
        if not token_id >= 0:
            raise InvalidArgumentError("TOKEN_ID_OUT_OF_RANGE", f"token id {token_id} is negative", field="token_ids")
        added = self._added.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(token_id)
        # Qwen2's embedding is padded: the ids between the last token and vocab_size stand for nothing.
        return b"" if token is None else bytes(_BYTE_OF[char] for char in token)


def load_tokenizer(path: Path) -> Tokenizer:
    """From a folder or a .gguf file. Raises CheckpointError saying which files were expected."""
    if path.is_file():
        return _from_gguf(path)
    config = _read_json(path / "tokenizer_config.json", {})
    template = _chat_template(path, config)
    if (path / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise _unreadable(path / "tokenizer.json", error) from None
        backend.no_padding()
        backend.no_truncation()
        return Tokenizer(backend, special_ids=_special_ids(backend), chat_template=template)
    vocab = _read_json(path / "vocab.json", None)
    merges = path / "merges.txt"
    if vocab is None or not merges.is_file():
        raise CheckpointError(
            "TOKENIZER_MISSING",
            f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt",
            path=path,
        )
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    added = {
        int(token_id): AddedToken(
            entry["content"],
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            single_word=entry.get("single_word", False),
            normalized=entry.get("normalized", False),
            special=entry.get("special", False),
        )
        for token_id, entry in config.get("added_tokens_decoder", {}).items()
    }
    pre_tokenizer = _split_then_bytes(QWEN2_PATTERN)
    backend = _byte_level_bpe(vocab, pairs, added, normalizers.NFC(), pre_tokenizer, source=str(path))
    return Tokenizer(backend, special_ids=_special_ids(backend), chat_template=template)


def _from_gguf(path: Path) -> Tokenizer:
    data = read_gguf_tokenizer(path)
    if data.model != "gpt2" or data.pre not in ("qwen2", "smollm"):
        raise CheckpointError(
            "TOKENIZER_NOT_SERVED",
            f"{path}: tokenizer model {data.model!r} with pre-tokenizer {data.pre!r} is not served; expected 'gpt2' with "
            "'qwen2' or 'smollm'",
            model=data.model, pre=data.pre,
        )  # fmt: skip
    if data.pre == "qwen2":
        normalizer: normalizers.Normalizer | None = normalizers.NFC()
        pre_tokenizer: pre_tokenizers.PreTokenizer = _split_then_bytes(QWEN2_PATTERN)
    else:  # SmolLM: every digit alone, then GPT-2's own pattern; no normalization
        normalizer = None
        pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    vocab = {token: i for i, token in enumerate(data.tokens)}
    added = {
        i: AddedToken(data.tokens[i], normalized=False, special=kind == _CONTROL)
        for i, kind in enumerate(data.token_types)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    pairs = [tuple(merge.split(" ")) for merge in data.merges]
    backend = _byte_level_bpe(vocab, pairs, added, normalizer, pre_tokenizer, source=str(path))
    return Tokenizer(backend, special_ids=_special_ids(backend), chat_template=data.chat_template)


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    added: Mapping[int, AddedToken],
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    source: str,
) -> tokenizers.Tokenizer:
    """A byte-level BPE. Raises CheckpointError where merges and vocabulary do not fit, or an added token's id is taken."""
    try:
        # Added tokens are given their ids through the vocabulary: the library numbers new ones by itself otherwise.
        full = {**vocab, **{token.content: token_id for token_id, token in added.items()}}
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=full, merges=[(left, right) for left, right in merges], fuse_unk=False, byte_fallback=False
            )
        )
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(Path(source), error) from None
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([token for _, token in sorted(added.items())])
    return backend


def _special_ids(backend: tokenizers.Tokenizer) -> list[int]:
    return [i for i, token in backend.get_added_tokens_decoder().items() if token.special]


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    file = path / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else template


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError("TOKENIZER_UNREADABLE", f"{path}: not a readable tokenizer: {error}", path=path)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al., 2019): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
