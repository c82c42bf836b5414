"""From raw fields to a request that the engine can trust: every rule of the public protocol, once for all doors.

Pure: a function of the raw request, the prompt's token ids and ModelInfo, but for a seed that is drawn where none was
given. Every error names the field as the client wrote it, the value, and what was expected.
"""

from __future__ import annotations

from typing import Any

from gateway.api.checks import check_token_ids, count_at_most, fail, real, shown_name, whole
from gateway.api.raw import RawRequest, RawResume
from gateway.api.request_id import check_request_id, new_request_id
from gateway.types import MAX_PRIORITY, GenerateRequest, ModelInfo, SamplingParams
from stageline.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**64 - 1
MAX_CACHE_SALT_BYTES = 256


def check_served(raw: RawRequest, model: ModelInfo) -> None:
    """What can be refused before the prompt is tokenized.

    Raises NotFoundError for another model, UnimplementedError for a documented field that is not served, and
    InvalidArgumentError for no prompt or a name that is too long.
    """
    if raw.model not in (None, "", model.name):
        raise NotFoundError(
            "MODEL_NOT_FOUND", f"model {raw.model!r} is not served here; this server has {model.name!r}",
            field=shown_name(raw, "model"), model=raw.model, served=model.name,
        )  # fmt: skip
    if raw.prompt is None:
        fail(raw, "prompt", "PROMPT_MISSING", "is required: text, token ids or a conversation")
    if raw.request_id:
        check_request_id(raw.request_id, shown_name(raw, "request_id"))


def validate(raw: RawRequest, prompt_token_ids: tuple[int, ...], model: ModelInfo) -> GenerateRequest:
    """The request, complete. Raises InvalidArgumentError, or FailedPreconditionError for a resume of another model."""
    _check_prompt(raw, prompt_token_ids, model)
    num_choices = whole(raw, "num_choices", raw.num_choices, 1, low=1, high=MAX_CHOICES)
    generated = whole(raw, "best_of", raw.best_of, num_choices, low=1, high=MAX_CHOICES)
    if generated < num_choices:
        fail(raw, "best_of", "BEST_OF_OUT_OF_RANGE", f"is {generated}, less than the {num_choices} choices asked for",
             value=generated, num_choices=num_choices)  # fmt: skip
    resume = _check_resume(raw, raw.resume, generated, model) if raw.resume is not None else None
    if raw.constraint is not None and raw.ignore_eos:
        fail(raw, "ignore_eos", "IGNORE_EOS_WITH_GRAMMAR",
             f"cannot be used with {raw.constraint.field}: an end token is how such an answer ends")  # fmt: skip
    if resume is not None and resume.token_ids and raw.num_prompt_logprobs is not None:
        fail(raw, "num_prompt_logprobs", "RESUME_WITH_PROMPT_LOGPROBS",
             "cannot be resumed: the first delta of the answer had them; leave it out")  # fmt: skip
    sampling = _sampling_params(raw, len(prompt_token_ids), model, None if resume is None else resume.seed)
    if resume is not None and len(resume.token_ids) > sampling.max_tokens:
        fail(
            raw, "resume.token_ids", "RESUME_TOO_LONG",
            f"has {len(resume.token_ids)} tokens, more than max_tokens ({sampling.max_tokens})",
            length=len(resume.token_ids), max_tokens=sampling.max_tokens,
        )  # fmt: skip
    return GenerateRequest(
        request_id=raw.request_id or new_request_id(),
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        num_choices=generated,
        first_choice=0 if resume is None else resume.choice_index,
        resume_token_ids=() if resume is None else tuple(resume.token_ids),
        priority=whole(raw, "priority", raw.priority, 0, low=-MAX_PRIORITY, high=MAX_PRIORITY),
        deadline_s=raw.deadline_s,
        num_prompt_logprobs=_num_prompt_logprobs(raw, model),
        cache_salt=_cache_salt(raw),
    )


def _cache_salt(raw: RawRequest) -> str:
    if raw.cache_salt is None:
        return ""
    try:
        length = len(raw.cache_salt.encode())
    except UnicodeEncodeError:
        fail(raw, "cache_salt", "CACHE_SALT_INVALID", "is not Unicode: it has a lone surrogate")
    if not 1 <= length <= MAX_CACHE_SALT_BYTES:
        fail(raw, "cache_salt", "CACHE_SALT_OUT_OF_RANGE", f"has {length} bytes, expected 1 to {MAX_CACHE_SALT_BYTES}",
             length=length, limit=MAX_CACHE_SALT_BYTES)  # fmt: skip
    return raw.cache_salt


def _num_prompt_logprobs(raw: RawRequest, model: ModelInfo) -> int | None:
    if raw.num_prompt_logprobs is None:
        return None
    high = min(MAX_LOGPROBS, model.vocab_size)
    return whole(raw, "num_prompt_logprobs", raw.num_prompt_logprobs, None, high=high)


def _sampling_params(raw: RawRequest, num_prompt: int, model: ModelInfo, resume_seed: int | None) -> SamplingParams:
    max_tokens = _max_tokens(raw, num_prompt, model)
    stop_token_ids = tuple(dict.fromkeys(raw.stop_token_ids))
    count_at_most(raw, "stop_token_ids", len(stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_token_ids(stop_token_ids, model.vocab_size, shown_name(raw, "stop_token_ids"))
    count_at_most(raw, "stop_strings", len(raw.stop_strings), MAX_STOP_STRINGS)
    if "" in raw.stop_strings:
        fail(raw, "stop_strings", "STOP_STRING_EMPTY", "holds an empty string, which would stop at once; leave it out")
    num_logprobs = raw.num_logprobs
    if num_logprobs is not None:
        num_logprobs = whole(raw, "num_logprobs", num_logprobs, 0, high=min(MAX_LOGPROBS, model.vocab_size))
    seed = whole(raw, "seed", raw.seed, resume_seed, high=MAX_SEED)
    default = model.generation_defaults
    greedy = default.get("do_sample") is False
    return SamplingParams(
        temperature=real(raw, "temperature", raw.temperature, 0.0 if greedy else default.get("temperature"), 1.0),
        top_p=real(raw, "top_p", raw.top_p, default.get("top_p"), 1.0, high=1.0, above_low=True),
        top_k=whole(raw, "top_k", raw.top_k, default.get("top_k") or 0, high=2**31 - 1),
        min_p=real(raw, "min_p", raw.min_p, default.get("min_p"), 0.0, high=1.0),
        repetition_penalty=real(
            raw, "repetition_penalty", raw.repetition_penalty, default.get("repetition_penalty"), 1.0, above_low=True
        ),
        frequency_penalty=real(raw, "frequency_penalty", raw.frequency_penalty, None, 0.0, low=-2.0, high=2.0),
        presence_penalty=real(raw, "presence_penalty", raw.presence_penalty, None, 0.0, low=-2.0, high=2.0),
        logit_bias=_logit_bias(raw, model.vocab_size),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=_min_tokens(raw, max_tokens),
        stop_strings=tuple(raw.stop_strings),
        stop_token_ids=stop_token_ids,
        eos_token_ids=() if raw.ignore_eos else end_token_ids(model),
        include_stop_string=bool(raw.include_stop_string),
        num_logprobs=num_logprobs,
        skip_special_tokens=raw.skip_special_tokens is not False,
    )


def end_token_ids(model: ModelInfo) -> tuple[int, ...]:
    """The model's own end tokens and those of generation_config.json (`eos_token_id`: one id, or a list)."""
    more: Any = model.generation_defaults.get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list | tuple) else [more]
    return tuple(dict.fromkeys([*model.eos_token_ids, *more]))


def _check_prompt(raw: RawRequest, token_ids: tuple[int, ...], model: ModelInfo) -> None:
    if not token_ids:
        fail(raw, "prompt", "PROMPT_EMPTY", "is empty; send at least one token")
    check_token_ids(token_ids, model.vocab_size, shown_name(raw, "prompt"))
    if len(token_ids) >= model.max_context_tokens + (raw.max_tokens == 0):  # nothing generated: all of it may be prompt
        fail(
            raw, "prompt", "CONTEXT_LENGTH_EXCEEDED",
            f"has {len(token_ids)} tokens; prompt and answer together have at most {model.max_context_tokens}",
            prompt_tokens=len(token_ids), max_context_tokens=model.max_context_tokens,
        )  # fmt: skip


def _max_tokens(raw: RawRequest, num_prompt: int, model: ModelInfo) -> int:
    left = model.max_context_tokens - num_prompt
    if raw.max_tokens is None:
        return left if raw.default_max_tokens is None else min(left, raw.default_max_tokens)
    low = 0 if raw.echo or raw.num_prompt_logprobs is not None else 1  # else there is nothing to answer
    asked = whole(raw, "max_tokens", raw.max_tokens, None, low=low, high=2**31 - 1)
    if asked > left:
        fail(
            raw, "max_tokens", "CONTEXT_LENGTH_EXCEEDED",
            f"is {asked}, and the prompt has {num_prompt} tokens; together at most {model.max_context_tokens} "
            f"(max_tokens at most {left} for this prompt)",
            value=asked, prompt_tokens=num_prompt, max_context_tokens=model.max_context_tokens,
        )  # fmt: skip
    return asked


def _min_tokens(raw: RawRequest, max_tokens: int) -> int:
    asked = whole(raw, "min_tokens", raw.min_tokens, 0, high=2**31 - 1)
    if asked > max_tokens:
        fail(
            raw, "min_tokens", "MIN_TOKENS_OUT_OF_RANGE", f"is {asked}, more than max_tokens ({max_tokens})",
            value=asked, max_tokens=max_tokens,
        )  # fmt: skip
    return asked


def _logit_bias(raw: RawRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    count_at_most(raw, "logit_bias", len(raw.logit_bias), MAX_LOGIT_BIAS)
    shown = shown_name(raw, "logit_bias")
    for token_id, value in raw.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            fail(
                raw, "logit_bias", "TOKEN_ID_OUT_OF_RANGE", f"names token id {token_id}; ids are in [0, {vocab_size})",
                value=token_id, vocab_size=vocab_size,
            )  # fmt: skip
        if not -100 <= value <= 100:  # false for NaN too
            raise InvalidArgumentError(
                "LOGIT_BIAS_OUT_OF_RANGE", f"{shown}[{token_id}] must be in [-100, 100], got {value}",
                field=f"{shown}[{token_id}]", value=value,
            )  # fmt: skip
    return tuple(sorted(raw.logit_bias.items()))


def _check_resume(raw: RawRequest, resume: RawResume, num_choices: int, model: ModelInfo) -> RawResume:
    if resume.model_fingerprint != model.fingerprint:
        raise FailedPreconditionError(
            "MODEL_FINGERPRINT_MISMATCH",
            f"the generation was begun by model {resume.model_fingerprint!r}, this server has {model.fingerprint!r}; "
            "begin again",
            field=shown_name(raw, "resume.model_fingerprint"), value=resume.model_fingerprint, served=model.fingerprint,
        )  # fmt: skip
    if num_choices != 1:
        fail(
            raw,
            "num_choices",
            "RESUME_ONE_CHOICE",
            f"is {num_choices}; a resume continues exactly one",
            value=num_choices,
        )
    if raw.seed not in (None, resume.seed):
        fail(raw, "seed", "RESUME_SEED_MISMATCH", f"is {raw.seed}, the resumed generation has {resume.seed}",
              value=raw.seed, expected=resume.seed)  # fmt: skip
    whole(raw, "resume.seed", resume.seed, None, high=MAX_SEED)
    whole(raw, "resume.choice_index", resume.choice_index, None, high=MAX_CHOICES - 1)
    check_token_ids(resume.token_ids, model.vocab_size, shown_name(raw, "resume.token_ids"))
    return resume
