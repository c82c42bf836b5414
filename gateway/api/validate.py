"""Raw fields of a request, from either door, to checked parameters. Nothing is clipped and nothing is ignored."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.types import ModelInfo, SamplingParams
from stageline.errors import InvalidArgumentError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 1024


@dataclass(slots=True, kw_only=True)
class RawParams:
    """Sampling fields as a client sent them; None is unset and takes the model's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_string: bool = False
    num_logprobs: int | None = None
    skip_special_tokens: bool = True


def check_prompt(token_ids: Sequence[int], model: ModelInfo) -> None:
    """Raise InvalidArgumentError for an empty prompt, ids out of range, or a prompt that leaves no room for an answer."""
    if not token_ids:
        raise InvalidArgumentError("PROMPT_EMPTY", "the prompt must hold at least one token", field="prompt")
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidArgumentError(
                "TOKEN_ID_OUT_OF_RANGE", f"prompt token {index} is {token_id}, expected 0 to {model.vocab_size - 1}",
                field="prompt", index=index, token_id=token_id,
            )  # fmt: skip
    if len(token_ids) >= model.max_context_tokens:
        raise InvalidArgumentError(
            "PROMPT_TOO_LONG",
            f"the prompt has {len(token_ids)} tokens; with at least one token of answer it must stay within the context of "
            f"{model.max_context_tokens}: shorten it",
            field="prompt", prompt_tokens=len(token_ids), max_context_tokens=model.max_context_tokens,
        )  # fmt: skip


def sampling_params(
    raw: RawParams, model: ModelInfo, *, prompt_tokens: int, default_max_tokens: int | None
) -> SamplingParams:
    """Complete from generation_config.json, check every field, draw a seed where there is none.

    `default_max_tokens` None means what is left of the context. Raises InvalidArgumentError naming the field.
    """
    defaults = model.generation_defaults
    greedy = defaults.get("do_sample") is False

    def pick(name: str, given: float | None, fallback: float) -> float:
        value = given if given is not None else defaults.get(name)
        return fallback if value is None else float(value)  # type: ignore[arg-type]

    room = model.max_context_tokens - prompt_tokens
    max_tokens = raw.max_tokens if raw.max_tokens is not None else min(room, default_max_tokens or room)
    _range("max_tokens", max_tokens, 1, math.inf)
    if max_tokens > room:
        raise InvalidArgumentError(
            "MAX_TOKENS_TOO_LARGE",
            f"prompt ({prompt_tokens} tokens) + max_tokens ({max_tokens}) exceed the context of {model.max_context_tokens}",
            field="max_tokens", prompt_tokens=prompt_tokens, max_tokens=max_tokens,
            max_context_tokens=model.max_context_tokens,
        )  # fmt: skip
    min_tokens = raw.min_tokens or 0
    _range("min_tokens", min_tokens, 0, max_tokens)
    if raw.num_logprobs is not None:
        _range("num_logprobs", raw.num_logprobs, 0, MAX_LOGPROBS)
    seed = raw.seed if raw.seed is not None else secrets.randbits(63)
    return SamplingParams(
        temperature=_range(
            "temperature",
            pick("temperature", raw.temperature, 1.0) if not greedy or raw.temperature is not None else 0.0,
            0,
            1e4,
        ),
        top_p=_range("top_p", pick("top_p", raw.top_p, 1.0), 0, 1, open_low=True),
        top_k=int(_range("top_k", pick("top_k", raw.top_k, 0), 0, math.inf)),
        min_p=_range("min_p", pick("min_p", raw.min_p, 0.0), 0, 1),
        repetition_penalty=_range(
            "repetition_penalty", pick("repetition_penalty", raw.repetition_penalty, 1.0), 0, 1e4, open_low=True
        ),
        frequency_penalty=_range("frequency_penalty", raw.frequency_penalty or 0.0, -2, 2),
        presence_penalty=_range("presence_penalty", raw.presence_penalty or 0.0, -2, 2),
        logit_bias=_logit_bias(raw.logit_bias, model),
        seed=int(_range("seed", seed, 0, 2**64 - 1)),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_strings=_stop_strings(raw.stop_strings),
        stop_token_ids=_stop_ids(raw.stop_token_ids, model),
        eos_token_ids=() if raw.ignore_eos else model.eos_token_ids,
        include_stop_string=raw.include_stop_string,
        num_logprobs=raw.num_logprobs,
        skip_special_tokens=raw.skip_special_tokens,
    )


def check_num_choices(count: int) -> int:
    """Answers a request may ask for."""
    return int(_range("n", count, 1, MAX_CHOICES))


def _range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    inside = low < value <= high if open_low else low <= value <= high
    if not inside or not math.isfinite(value):
        bound = f"over {low:g}" if open_low else f"at least {low:g}"
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise InvalidArgumentError(
            "OUT_OF_RANGE", f"{name} must be {bound}{upper}, got {value}", field=name, value=value, low=low, high=high
        )
    return value


def _logit_bias(bias: Mapping[int, float], model: ModelInfo) -> tuple[tuple[int, float], ...]:
    _range("logit_bias entries", len(bias), 0, MAX_LOGIT_BIAS)
    for token_id, value in bias.items():
        if not 0 <= token_id < model.vocab_size:
            raise InvalidArgumentError(
                "TOKEN_ID_OUT_OF_RANGE", f"logit_bias: token id {token_id} is not in 0 to {model.vocab_size - 1}",
                field="logit_bias", token_id=token_id,
            )  # fmt: skip
        _range("logit_bias", value, -100, 100)
    return tuple(sorted(bias.items()))


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOP_STRINGS or not all(stops):
        raise InvalidArgumentError(
            "STOP_INVALID",
            f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty; got {len(stops)}",
            field="stop",
        )
    return tuple(stops)


def _stop_ids(token_ids: Sequence[int], model: ModelInfo) -> tuple[int, ...]:
    for token_id in token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise InvalidArgumentError(
                "TOKEN_ID_OUT_OF_RANGE", f"stop_token_ids: {token_id} is not in 0 to {model.vocab_size - 1}",
                field="stop_token_ids", token_id=token_id,
            )  # fmt: skip
    return tuple(token_ids)
