"""Every rule of the public protocol, at its edges."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.raw import RawRequest, RawResume, TokenPrompt
from gateway.api.validate import check_served, validate
from gateway.sampling import make_sampling
from gateway.types import ModelInfo, to_float32
from stageline.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

PROMPT = (1, 2, 3)


def model(**defaults) -> ModelInfo:
    return ModelInfo(
        name="m",
        fingerprint="f",
        max_context_tokens=100,
        vocab_size=50,
        eos_token_ids=(9,),
        generation_defaults=defaults,
    )


def accept(prompt=PROMPT, info=None, **fields):
    return validate(RawRequest(prompt=TokenPrompt(prompt), **fields), prompt, info or model())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *(({"temperature": v}, "TEMPERATURE_OUT_OF_RANGE") for v in (-0.1, math.nan, math.inf, -math.inf, 1e39)),
        *(({"top_p": v}, "TOP_P_OUT_OF_RANGE") for v in (0.0, -1.0, 1.01, math.nan, 1e-50)),
        *(({"min_p": v}, "MIN_P_OUT_OF_RANGE") for v in (-0.1, 1.1, math.nan)),
        *(({"top_k": v}, "TOP_K_OUT_OF_RANGE") for v in (-1, 2**31)),
        *(
            ({"repetition_penalty": v}, "REPETITION_PENALTY_OUT_OF_RANGE")
            for v in (0.0, -1.0, math.inf, math.nan, 1e-50, 1e39)
        ),
        *(({"frequency_penalty": v}, "FREQUENCY_PENALTY_OUT_OF_RANGE") for v in (-2.1, 2.1, math.nan)),
        *(({"presence_penalty": v}, "PRESENCE_PENALTY_OUT_OF_RANGE") for v in (-2.1, 2.1, math.nan)),
        *(({"seed": v}, "SEED_OUT_OF_RANGE") for v in (-1, 2**64)),
        *(({"num_logprobs": v}, "NUM_LOGPROBS_OUT_OF_RANGE") for v in (-1, 21)),
        *(({"num_choices": v}, "NUM_CHOICES_OUT_OF_RANGE") for v in (0, -1, 129)),
        ({"max_tokens": 0}, "MAX_TOKENS_OUT_OF_RANGE"),
        ({"max_tokens": 98}, "CONTEXT_LENGTH_EXCEEDED"),
        ({"min_tokens": -1}, "MIN_TOKENS_OUT_OF_RANGE"),
        ({"min_tokens": 6, "max_tokens": 5}, "MIN_TOKENS_OUT_OF_RANGE"),
        ({"logit_bias": {50: 1.0}}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"logit_bias": {1: 100.1}}, "LOGIT_BIAS_OUT_OF_RANGE"),
        ({"logit_bias": {1: math.nan}}, "LOGIT_BIAS_OUT_OF_RANGE"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "LOGIT_BIAS_TOO_MANY"),
        ({"stop_strings": ["a", ""]}, "STOP_STRING_EMPTY"),
        ({"stop_strings": ["a"] * 17}, "STOP_STRINGS_TOO_MANY"),
        ({"stop_token_ids": [50]}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"stop_token_ids": [-1]}, "TOKEN_ID_OUT_OF_RANGE"),
    ],
)
def test_refused_by_name(fields, reason):
    with pytest.raises(InvalidArgumentError) as caught:
        accept(**fields)
    assert caught.value.reason == reason
    assert caught.value.metadata["field"].startswith(next(iter(fields)))
    assert caught.value.metadata["field"] in caught.value.message


def test_edges_that_are_inside():
    sampling = accept(
        temperature=0.0, top_p=1.0, min_p=1.0, top_k=0, repetition_penalty=0.01, frequency_penalty=-2.0,
        presence_penalty=2.0, seed=2**64 - 1, num_logprobs=20, max_tokens=97, min_tokens=97, logit_bias={49: -100.0},
        stop_strings=["a"] * 16, stop_token_ids=[0, 49, 0],
    ).sampling  # fmt: skip
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (2**64 - 1, 97, 97)
    assert sampling.stop_token_ids == (0, 49)


@pytest.mark.parametrize(
    ("prompt", "reason", "field"),
    [
        ((), "PROMPT_EMPTY", "prompt"),
        ((1, 50), "TOKEN_ID_OUT_OF_RANGE", "prompt[1]"),
        ((-1,), "TOKEN_ID_OUT_OF_RANGE", "prompt[0]"),
        ((1,) * 100, "CONTEXT_LENGTH_EXCEEDED", "prompt"),
    ],
)
def test_prompts(prompt, reason, field):
    with pytest.raises(InvalidArgumentError) as caught:
        accept(prompt)
    assert (caught.value.reason, caught.value.metadata["field"]) == (reason, field)


def test_default_max_tokens_is_what_is_left_or_the_doors():
    assert accept().sampling.max_tokens == 97
    assert accept(default_max_tokens=16).sampling.max_tokens == 16
    assert accept((1,) * 95, default_max_tokens=16).sampling.max_tokens == 5


def test_generation_config_fills_what_is_not_given():
    info = model(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, do_sample=True, eos_token_id=[9, 8])
    sampling = accept(info=info).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == pytest.approx((0.7, 0.8, 20))
    assert (sampling.repetition_penalty, sampling.eos_token_ids) == (to_float32(1.05), (9, 8))
    given = accept(info=info, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, ignore_eos=True).sampling
    assert (given.temperature, given.top_p, given.top_k, given.repetition_penalty) == (0.0, 1.0, 0, 1.0)
    assert given.eos_token_ids == ()


@given(st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 100), st.floats(0.01, 100), st.floats(-2, 2))
def test_the_last_stage_sees_the_same_numbers(top_p, min_p, temperature, repetition, other):
    params = accept(
        top_p=top_p, min_p=min_p, temperature=temperature, repetition_penalty=repetition, frequency_penalty=other,
        presence_penalty=other,
    ).sampling  # fmt: skip
    sent = make_sampling(params, choice_index=0, output_position=0)
    for name in ("top_p", "min_p", "temperature", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert getattr(params, name) == getattr(sent, name)


def test_a_number_too_small_for_the_wire_is_nought_on_both_sides():
    params = accept(temperature=1e-50, min_p=1e-50, frequency_penalty=1e-50).sampling
    assert (params.temperature, params.min_p, params.has_penalties()) == (0, 0, False)


def test_do_sample_false_is_greedy_unless_a_temperature_is_given():
    info = model(do_sample=False, temperature=0.7, eos_token_id=7)
    assert accept(info=info).sampling.temperature == 0.0
    assert accept(info=info, temperature=0.5).sampling.temperature == 0.5
    assert accept(info=info).sampling.eos_token_ids == (9, 7)
    assert accept(info=model()).sampling.temperature == 1.0


def test_bad_default_says_where_it_is_from():
    with pytest.raises(InvalidArgumentError, match=r"generation_config\.json"):
        accept(info=model(top_p=0.0))
    accept(info=model(top_p=0.0), top_p=0.5)


def test_seed_is_kept_or_drawn():
    assert accept(seed=0).sampling.seed == 0
    drawn = {accept().sampling.seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_names_of_the_door_are_used():
    with pytest.raises(InvalidArgumentError) as caught:
        accept(num_choices=0, names={"num_choices": "n"})
    assert caught.value.metadata["field"] == "n"
    assert caught.value.message.startswith("n must be in [1, 128]")


def test_served_or_refused():
    check_served(RawRequest(prompt=TokenPrompt((1,)), model="m", priority=0), model())
    check_served(RawRequest(prompt=TokenPrompt((1,)), model=None), model())
    with pytest.raises(NotFoundError):
        check_served(RawRequest(prompt=TokenPrompt((1,)), model="M"), model())
    with pytest.raises(InvalidArgumentError, match="is required"):
        check_served(RawRequest(prompt=None), model())


def test_nothing_to_generate_where_the_prompt_is_asked_about():
    assert accept(max_tokens=0, num_prompt_logprobs=3).num_prompt_logprobs == 3
    assert accept(max_tokens=0, echo=True).sampling.max_tokens == 0
    assert len(accept((1,) * 100, max_tokens=0, num_prompt_logprobs=0).prompt_token_ids) == 100
    for prompt, fields in (((1,) * 101, {"max_tokens": 0, "echo": True}), ((1,) * 100, {"num_prompt_logprobs": 0})):
        with pytest.raises(InvalidArgumentError, match="100"):
            accept(prompt, **fields)
    for number in (-1, 21):
        with pytest.raises(InvalidArgumentError) as caught:
            accept(num_prompt_logprobs=number)
        assert caught.value.reason == "NUM_PROMPT_LOGPROBS_OUT_OF_RANGE"


def test_a_resume_cannot_score_the_prompt_again():
    with pytest.raises(InvalidArgumentError) as caught:
        accept(resume=resume(), num_prompt_logprobs=1)
    assert caught.value.reason == "RESUME_WITH_PROMPT_LOGPROBS"
    assert accept(resume=resume(token_ids=[]), num_prompt_logprobs=1).num_prompt_logprobs == 1


def resume(**fields) -> RawResume:
    return RawResume(**{"token_ids": [4, 5], "model_fingerprint": "f", "seed": 3, "choice_index": 2, **fields})


def test_resume_continues_one_choice():
    request = accept(resume=resume(), max_tokens=2)
    assert (request.first_choice, request.num_choices, request.resume_token_ids) == (2, 1, (4, 5))
    assert request.sampling.seed == 3


@pytest.mark.parametrize(
    ("changed", "fields", "kind", "field"),
    [
        ({"model_fingerprint": "g"}, {}, FailedPreconditionError, "resume.model_fingerprint"),
        ({}, {"num_choices": 2}, InvalidArgumentError, "num_choices"),
        ({}, {"seed": 4}, InvalidArgumentError, "seed"),
        ({}, {"max_tokens": 1}, InvalidArgumentError, "resume.token_ids"),
        ({"token_ids": [50]}, {}, InvalidArgumentError, "resume.token_ids[0]"),
        ({"choice_index": 128}, {}, InvalidArgumentError, "resume.choice_index"),
    ],
)
def test_resume_refused(changed, fields, kind, field):
    with pytest.raises(kind) as caught:
        accept(resume=resume(**changed), **fields)
    assert caught.value.metadata["field"] == field
