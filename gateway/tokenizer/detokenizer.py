"""Incremental detokenization: never half a character, and together exactly what decoding the whole would give."""

from __future__ import annotations

import codecs

from gateway.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Feeds the tokens' bytes to an incremental UTF-8 decoder; constant work a token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token_id: int) -> str:
        """The text that is final now; the bytes of an incomplete character wait for the rest.

        Raises InvalidArgumentError for an id out of range.
        """
        data = self._tokenizer.token_bytes(token_id)
        return "" if token_id in self._skipped else self._decoder.decode(data)

    def finish(self) -> str:
        """What waited: an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
