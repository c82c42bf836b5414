"""OpenAI's answer objects from deltas: chat and completions, whole and streamed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from gateway.tokenizer import Tokenizer
from gateway.types import ChoiceDelta, TokenLogprobs


class Form(Protocol):
    """How one endpoint writes its answers."""

    def chunk(self, delta: ChoiceDelta, index: int) -> dict[str, Any]:
        """A choice of a streamed object."""

    def whole(self, deltas: Sequence[ChoiceDelta], index: int) -> dict[str, Any]:
        """A choice of an answer in one piece."""


def envelope(kind: str, request_id: str, model: str, fingerprint: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The object around choices."""
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": choices,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChatForm:
    """Choices of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._greeted: set[int] = set()

    def chunk(self, delta: ChoiceDelta, index: int) -> dict[str, Any]:
        """The first chunk of a choice names the role."""
        content: dict[str, Any] = {"content": delta.text}
        if index not in self._greeted:
            self._greeted.add(index)
            content["role"] = "assistant"
        return self._choice("delta", content, index, [delta])

    def whole(self, deltas: Sequence[ChoiceDelta], index: int) -> dict[str, Any]:
        """See Form."""
        text = "".join(delta.text for delta in deltas)
        return self._choice("message", {"role": "assistant", "content": text}, index, deltas)

    def _choice(self, key: str, content: dict[str, Any], index: int, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        entries = [entry for delta in deltas for entry in delta.logprobs]
        return {
            "index": index,
            key: content,
            "logprobs": {"content": [self._entry(entry) for entry in entries]} if entries else None,
            "finish_reason": _finish(deltas),
        }

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(*pair) for pair in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}


class CompletionForm:
    """Choices of /v1/completions."""

    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def chunk(self, delta: ChoiceDelta, index: int) -> dict[str, Any]:
        """See Form."""
        return self.whole([delta], index)

    def whole(self, deltas: Sequence[ChoiceDelta], index: int) -> dict[str, Any]:
        """See Form."""
        entries = [entry for delta in deltas for entry in delta.logprobs]
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(entries, index) if entries else None,
            "finish_reason": _finish(deltas),
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs], index: int) -> dict[str, Any]:
        tokens = [self._text(entry.token_id) for entry in entries]
        offsets, offset = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._text(i): value for i, value in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def _finish(deltas: Sequence[ChoiceDelta]) -> str | None:
    reason = deltas[-1].finish_reason
    return reason.value if reason is not None else None
