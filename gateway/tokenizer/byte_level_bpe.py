"""Byte-level BPE backends from their parts: vocabulary, merges, added tokens and one of two pre-tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from stageline.errors import CheckpointError

# Qwen2's own pattern, as transformers' Qwen2Tokenizer and llama.cpp's pre-tokenizer `qwen2` have it.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_byte_level_bpe(
    *,
    kind: Literal["qwen2", "smollm"],
    vocab: Mapping[str, int],
    merges: Sequence[str],
    added: Mapping[int, AddedToken],
    source: Path,
) -> tokenizers.Tokenizer:
    """A backend. `merges` are `"left right"`, best first; `added` tokens keep their ids.

    Raises CheckpointError (TOKENIZER_UNREADABLE) where merges and vocabulary do not fit or two tokens share an id.
    """
    # The library numbers added tokens by itself unless the vocabulary has them.
    full = {**vocab, **{token.content: token_id for token_id, token in added.items()}}
    if len(set(full.values())) != len(full):
        taken = {token_id: text for text, token_id in vocab.items()}
        clash = next((f": {i} is {taken[i]!r} and {t.content!r}" for i, t in added.items()
                      if taken.get(i, t.content) != t.content), "")  # fmt: skip
        raise unreadable(source, f"two tokens have the same id{clash}")
    try:
        pairs = [_pair(merge) for merge in merges]
        backend = tokenizers.Tokenizer(models.BPE(vocab=full, merges=pairs, fuse_unk=False, byte_fallback=False))
        if kind == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _pre_tokenizer(kind)
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens([token for _, token in sorted(added.items())])
    except Exception as error:  # the library raises bare Exception
        raise unreadable(source, error) from None
    return backend


def unreadable(path: Path, fault: object) -> CheckpointError:
    """The error for a file that is there but is not what it should be."""
    return CheckpointError("TOKENIZER_UNREADABLE", f"{path}: not a readable tokenizer: {fault}", path=path)


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise ValueError(f"the merge {merge!r:.80} is not two tokens with a space between")
    return left, right


def _pre_tokenizer(kind: Literal["qwen2", "smollm"]) -> pre_tokenizers.PreTokenizer:
    if kind == "qwen2":
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    # smollm: every \p{N} alone, then GPT-2's pattern within what is left; llama.cpp and the model's own tokenizer agree.
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
