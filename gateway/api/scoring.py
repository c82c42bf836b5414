"""Scores of continuations, for every door: the raw request, its checks, and the answer. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.api.checks import check_token_ids, fail, shown_name, whole
from gateway.api.raw import Prompt, RawRequest, TextPrompt, TokenPrompt
from gateway.api.request_id import new_request_id
from gateway.api.validate import MAX_LOGPROBS
from gateway.types import ContinuationScore, ModelInfo, ScoreRequest
from stageline.errors import InvalidArgumentError

MAX_CONTINUATIONS = 4096
MAX_SCORED_ENTRIES = 131_072
"""Tokens of all continuations, times 1 + alternatives: some 3 MB of answer, below what gRPC clients take by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawScore:
    """A request as a door reads it; see RawRequest for `deadline_s` and `names`."""

    context: Prompt | None
    continuations: Sequence[TextPrompt | TokenPrompt | None]
    model: str | None = None
    request_id: str = ""
    num_logprobs: int | None = None
    deadline_s: float | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def generation(self) -> RawRequest:
        """What it shares with a generation, for the checks of one."""
        return RawRequest(prompt=self.context, model=self.model, request_id=self.request_id, names=self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The answer: one score for each continuation, in order. `num_cached_tokens` are those of the context that came from
    the prefix cache for every continuation."""

    request: ScoreRequest
    scores: Sequence[ContinuationScore]
    num_cached_tokens: int


def check_counts(raw: RawScore) -> None:
    """What can be refused before anything is tokenized. Raises InvalidArgumentError."""
    request, count = raw.generation(), len(raw.continuations)
    if not 1 <= count <= MAX_CONTINUATIONS:
        fail(request, "continuations", "CONTINUATIONS_OUT_OF_RANGE",
             f"has {count} entries, expected 1 to {MAX_CONTINUATIONS}", count=count, limit=MAX_CONTINUATIONS)  # fmt: skip
    for place, continuation in enumerate(raw.continuations):
        if continuation is None:
            _refuse(raw, place, "CONTINUATION_MISSING", "is required: text or token ids")


def validate_score(
    raw: RawScore, context: tuple[int, ...], continuations: tuple[tuple[int, ...], ...], model: ModelInfo
) -> ScoreRequest:
    """The request, complete. Raises InvalidArgumentError."""
    request = raw.generation()
    if not context:
        fail(request, "prompt", "PROMPT_EMPTY", "is empty; the first token of a text has no probability")
    check_token_ids(context, model.vocab_size, shown_name(request, "prompt"))
    num_logprobs = whole(request, "num_logprobs", raw.num_logprobs, 0, high=min(MAX_LOGPROBS, model.vocab_size))
    for place, tokens in enumerate(continuations):
        if not tokens:
            _refuse(raw, place, "CONTINUATION_EMPTY", "is empty; send at least one token")
        check_token_ids(tokens, model.vocab_size, _name(raw, place))
        if len(context) + len(tokens) > model.max_context_tokens:
            _refuse(
                raw, place, "CONTEXT_LENGTH_EXCEEDED",
                f"has {len(tokens)} tokens and the context {len(context)}; together they have at most "
                f"{model.max_context_tokens}",
                prompt_tokens=len(context), value=len(tokens), max_context_tokens=model.max_context_tokens,
            )  # fmt: skip
    entries = sum(map(len, continuations)) * (1 + num_logprobs)
    if entries > MAX_SCORED_ENTRIES:
        fail(request, "continuations", "CONTINUATIONS_TOO_LONG",
             f"have {sum(map(len, continuations))} tokens; times 1 + num_logprobs at most {MAX_SCORED_ENTRIES}, "
             "split the request", count=entries, limit=MAX_SCORED_ENTRIES)  # fmt: skip
    return ScoreRequest(
        request_id=raw.request_id or new_request_id(),
        context_token_ids=context,
        continuations=continuations,
        # One alternative is always computed: the greedy choice, ties included.
        num_logprobs=max(1, num_logprobs),
        deadline_s=raw.deadline_s,
    )


def is_greedy(score: ContinuationScore) -> bool:
    """Whether greedy decoding, which takes the lowest id of equal ones, would have written it."""
    return all(entry.token_id == entry.top[0][0] for entry in score.logprobs)


def _refuse(raw: RawScore, place: int, reason: str, problem: str, **metadata: object) -> None:
    name = _name(raw, place)
    raise InvalidArgumentError(reason, f"{name} {problem}", field=name, **metadata)


def _name(raw: RawScore, place: int) -> str:
    return f"{shown_name(raw.generation(), 'continuations')}[{place}]"
