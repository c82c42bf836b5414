"""OpenAI's answer objects, from deltas. One writer per request: it remembers what each choice has already sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from gateway.api.collect import Answer
from gateway.api.service import Accepted
from gateway.tokenizer import Detokenizer, Tokenizer
from gateway.types import ChoiceDelta, ModelInfo, TokenLogprobs, ToolCallDelta


class AnswerWriter:
    """What chat and text completions share: the envelope and the count of tokens."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, response_id: str, accepted: Sequence[Accepted], model: ModelInfo, tokenizer: Tokenizer) -> None:
        self._id, self._model, self._tokenizer = response_id, model, tokenizer
        self._created_s = accepted[0].created_s
        self._seed = accepted[0].request.sampling.seed
        self._skip_special_tokens = accepted[0].request.sampling.skip_special_tokens
        self._prompt_tokens = sum(len(one.request.prompt_token_ids) for one in accepted)
        self._completion_tokens = 0
        self._num_choices = accepted[0].request.num_choices
        self._num_returned = accepted[0].num_returned
        self._prompts = [one.request.prompt_token_ids for one in accepted]
        # Of each prompt, the tokens that no choice had to compute.
        self._cached_tokens = [len(one.request.prompt_token_ids) for one in accepted]

    def chunk(
        self, delta: ChoiceDelta, index: int, *, with_usage: bool, continuous: bool = False
    ) -> dict[str, Any] | None:
        """One streamed object; None where there is nothing to say yet. `index`: the choice's, over all prompts."""
        self._completion_tokens += len(delta.token_ids)
        self._count_cached(delta, index)
        choice = self._chunk_choice(delta, index)
        if choice is None:
            return None
        usage = {"usage": self._usage() if continuous else None} if with_usage else {}
        return {**self._envelope(self.chunk_object, [choice]), **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The last object of a stream with `include_usage`."""
        return {**self._envelope(self.chunk_object, []), "usage": self._usage()}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answers to all prompts in one piece; a choice's index is its place."""
        self._completion_tokens = sum(answer.completion_tokens for answer in answers)
        self._cached_tokens = [answer.cached_prompt_tokens for answer in answers]
        choices = [choice for answer in answers for choice in answer.choices]
        written = [self._whole_choice(choice, index) for index, choice in enumerate(choices)]
        return {**self._envelope(self.whole_object, written), "usage": self._usage()}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # `seed` is ours: the one drawn where the client sent none. OpenAI's clients keep unknown fields.
        return {
            "id": self._id,
            "object": kind,
            "created": self._created_s,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "seed": self._seed,
            "choices": choices,
        }

    def _count_cached(self, delta: ChoiceDelta, index: int) -> None:
        place = index // self._num_choices
        self._cached_tokens[place] = min(self._cached_tokens[place], delta.cached_prompt_tokens)

    def _usage(self) -> dict[str, Any]:
        total = self._prompt_tokens + self._completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    def _prompt_logprobs(self, entries: Sequence[TokenLogprobs], number: int) -> list[dict[str, Any] | None]:
        """vLLM's form: by token id, the alternatives and the token itself; null for the first token."""

        def one(token_id: int, logprob: float, rank: int) -> tuple[str, dict[str, Any]]:
            return str(token_id), {"logprob": logprob, "rank": rank, "decoded_token": self._text(token_id)}

        listed: list[dict[str, Any] | None] = [None]
        for entry in entries:
            tops = (one(*pair, place) for place, pair in enumerate(entry.top[:number], 1))
            listed.append(dict([one(entry.token_id, entry.logprob, entry.rank), *tops]))
        return listed

    def _text(self, token_id: int) -> str:
        """The token as text, or OpenAI's spelling of bytes that are not UTF-8 (the keys of a dict must differ)."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _chunk_choice(self, delta: ChoiceDelta, index: int) -> dict[str, Any] | None:
        raise NotImplementedError

    def _whole_choice(self, choice: ChoiceDelta, index: int) -> dict[str, Any]:
        raise NotImplementedError


class ChatWriter(AnswerWriter):
    """/v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, num_prompt_logprobs: int | None = None) -> None:
        """What the body asked for, beside AnswerWriter's."""
        super().__init__(*args)
        self._num_prompt_logprobs = num_prompt_logprobs
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """See AnswerWriter. There is one prompt, so vLLM writes its log-probabilities beside the choices."""
        whole = super().whole(answers)
        if (number := self._num_prompt_logprobs) is not None:
            whole["prompt_logprobs"] = self._prompt_logprobs(answers[0].choices[0].prompt_logprobs or (), number)
        return whole

    def _chunk_choice(self, delta: ChoiceDelta, index: int) -> dict[str, Any] | None:
        content: dict[str, Any] = {}
        if index not in self._begun:
            content = {"role": "assistant", "content": delta.text}
        elif delta.text:
            content = {"content": delta.text}
        if delta.tool_calls:
            content["tool_calls"] = [{"index": call.index, **_tool_call(call)} for call in delta.tool_calls]
        if not content and not delta.logprobs and delta.finish_reason is None:
            return None
        self._begun.add(index)
        return self._choice("delta", content, delta, index)

    def _whole_choice(self, choice: ChoiceDelta, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
        return self._choice("message", message, choice, index)

    def _choice(self, key: str, content: dict[str, Any], delta: ChoiceDelta, index: int) -> dict[str, Any]:
        logprobs = {"content": [self._entry(entry) for entry in delta.logprobs], "refusal": None}
        return {
            "index": index,
            key: content,
            "logprobs": logprobs if delta.logprobs else None,
            "finish_reason": _finish(delta),
        }

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        def one(token_id: int, logprob: float) -> dict[str, Any]:
            data = self._tokenizer.token_bytes(token_id)
            return {"token": data.decode("utf-8", errors="replace"), "bytes": list(data), "logprob": logprob}

        return {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]}


class CompletionWriter(AnswerWriter):
    """/v1/completions."""

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        *args: Any,
        echo: bool = False,
        num_logprobs: int | None = None,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        """What the body asked for, beside AnswerWriter's."""
        super().__init__(*args)
        self._echoes_logprobs = echo and num_logprobs is not None
        self._num_logprobs, self._num_prompt_logprobs = num_logprobs or 0, num_prompt_logprobs
        self._offsets: dict[int, _Offsets] = {}

    def _chunk_choice(self, delta: ChoiceDelta, index: int) -> dict[str, Any] | None:
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return None
        return self._whole_choice(delta, index)

    def _whole_choice(self, choice: ChoiceDelta, index: int) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice, index),
            "finish_reason": _finish(choice),
        }
        if self._num_prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(choice.prompt_logprobs or (), self._num_prompt_logprobs)
        return answer

    def _logprobs(self, choice: ChoiceDelta, index: int) -> dict[str, Any] | None:
        """Of an echoed prompt's tokens first: of the first of them there is none, since nothing comes before it."""
        offsets = self._offsets.setdefault(index, _Offsets(self._tokenizer, self._skip_special_tokens))
        prompt: Sequence[int] = ()
        entries = [*choice.logprobs]
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        if self._echoes_logprobs and choice.prompt_logprobs is not None:
            prompt = self._prompts[index // self._num_returned]
            entries = [*choice.prompt_logprobs, *entries]
            logprobs, tops = [None], [None]
        if not entries and not prompt:
            return None
        for entry in entries:
            logprobs.append(entry.logprob)
            tops.append(self._top(entry))
        generated = [entry.token_id for entry in choice.logprobs]
        return {
            "tokens": [self._text(token_id) for token_id in (*prompt, *generated)],
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": [*offsets.of_prompt(prompt), *map(offsets.of_next, generated)],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        if not self._num_logprobs:
            return {}
        top = {self._text(token_id): logprob for token_id, logprob in entry.top[: self._num_logprobs]}
        return {**top, self._text(entry.token_id): entry.logprob}


class _Offsets:
    """The place of each token's first character in the choice's text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._length = tokenizer, 0
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)

    def of_prompt(self, token_ids: Sequence[int]) -> list[int]:
        """For the tokens of an echoed prompt, whose text shows special tokens, too."""
        detokenizer, places, length = Detokenizer(self._tokenizer, skip_special_tokens=False), [], self._length
        for token_id in token_ids:
            places.append(length)
            length += len(detokenizer.append(token_id))
        if token_ids:
            self._length += len(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        return places

    def of_next(self, token_id: int) -> int:
        """For the next generated token."""
        place = self._length
        self._length += len(self._detokenizer.append(token_id))
        return place


def _finish(delta: ChoiceDelta) -> str | None:
    return None if delta.finish_reason is None else delta.finish_reason.value


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    """The first piece of a call has its id and name, the others only more of its arguments."""
    if not call.id:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
