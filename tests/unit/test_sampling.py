"""The choice is exact: the deterministic sampler, integrated over its random numbers, is the processed softmax."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gateway.sampling import choose, make_sampling
from gateway.sampling.choose import kept_probabilities
from gateway.types import SamplingParams
from stageline.errors import InternalError
from stages.logits import LogitsProcessor
from stages.logits.processor import num_kept

CPU = torch.device("cpu")
PROMPT, OUTPUT = (3, 5, 5, 7), (11, 3, 11)


def row(params: SamplingParams, *, suppressed=(), position=3, registered=True):
    sampling = make_sampling(
        params, choice_index=0, output_position=position, suppressed=suppressed,
        registration=(PROMPT, OUTPUT) if registered and params.has_penalties() else None,
    )  # fmt: skip
    return (1, np.array([OUTPUT[-1]], dtype=np.int32), len(PROMPT) + len(OUTPUT), sampling)


def reference(logits_V: torch.Tensor, params: SamplingParams, suppressed=()) -> np.ndarray:
    """The processed softmax, by transformers' processors in the written order; float64 probabilities [V]."""
    x = logits_V.clone()
    for token in suppressed:
        x[token] = -torch.inf
    for token, value in params.logit_bias:
        x[token] += value
    x = x[None]
    history = torch.tensor([PROMPT + OUTPUT])
    if params.repetition_penalty != 1:
        x = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(history, x)
    for token in set(OUTPUT):
        x[0, token] -= params.frequency_penalty * OUTPUT.count(token) + params.presence_penalty
    x = TemperatureLogitsWarper(params.temperature)(history, x)
    if params.top_k:
        x = TopKLogitsWarper(params.top_k)(history, x)
    if params.top_p < 1:
        x = TopPLogitsWarper(params.top_p)(history, x)
    if params.min_p:
        x = MinPLogitsWarper(params.min_p)(history, x)
    return torch.softmax(x[0].double(), dim=-1).numpy()


def integrated(logits_V: torch.Tensor, params: SamplingParams, suppressed=()) -> np.ndarray:
    """What the sampler does over all random numbers: the gateway's intervals, and the stage's draw within the tail."""
    processor = LogitsProcessor(len(logits_V), CPU)
    request = row(params, suppressed=suppressed)
    [result] = processor.process(logits_V[None].clone(), [request])
    ids = np.frombuffer(result.candidate_ids, dtype="<i4")
    head = kept_probabilities(result, params)
    total = np.zeros(len(logits_V))
    total[ids[: len(head)]] = head
    if result.HasField("tail"):
        # The tail draw is an inverse CDF over the kept tokens beyond the candidates, in sorted order.
        processed = processor._processed(logits_V.clone(), 1, request[1], request[2], request[3])
        order = torch.sort(processed, descending=True, stable=True)
        kept = num_kept(order.values.double(), request[3])
        rest = order.indices[len(ids) : kept].numpy()
        mass = np.exp(order.values[len(ids) : kept].double().numpy() - result.tail.kept_logsumexp)
        assert head.sum() + mass.sum() == pytest.approx(1, abs=1e-5)
        total[rest] = mass
        assert result.tail.token_id in rest
    else:
        assert head.sum() == pytest.approx(1, abs=1e-6)
    return total


GRID = [
    SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=other,
        presence_penalty=other / 2,
        logit_bias=((2, 1.5), (9, -3.0)),
        seed=5,
    )
    for temperature, top_k, top_p, min_p, repetition, other in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 5, 200), (1.0, 0.9, 0.3), (0.0, 0.05), (1.0, 1.3), (0.0, 0.7)
    )
]


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_every_combination_is_the_processed_softmax(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for params in GRID:
        logits_V = torch.randn(500, generator=generator) * scale
        np.testing.assert_allclose(
            integrated(logits_V, params, suppressed=(4,)), reference(logits_V, params, suppressed=(4,)), atol=2e-6,
            err_msg=str(params),
        )  # fmt: skip


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_p=0.95),
        SamplingParams(seed=1, top_p=0.5, temperature=0.7),
        SamplingParams(seed=1, min_p=0.02),
        SamplingParams(seed=1, top_k=10_000, top_p=0.9),
        SamplingParams(seed=1, top_k=50),
    ],
    ids=str,
)
def test_the_cut_may_fall_beyond_the_candidates(params: SamplingParams) -> None:
    """A flat distribution over Qwen2's vocabulary: the nucleus is far wider than 4,096 tokens."""
    logits_V = torch.randn(152_064, generator=torch.Generator().manual_seed(2)) * 0.3
    np.testing.assert_allclose(integrated(logits_V, params), reference(logits_V, params), atol=1e-7)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    """The whole way, random numbers included: 20,000 positions of one seed, chi-square over a tail-heavy row."""
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(seed=9)
    processor, counts, draws = LogitsProcessor(300, CPU), np.zeros(300), 20_000
    for position in range(draws):
        [result] = processor.process(logits_V[None].clone(), [row(params, position=position)])
        counts[choose(result, params, choice_index=0, position=position).token_id] += 1
    expected = reference(logits_V, params) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 300 + 5 * np.sqrt(2 * 300)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.integers(0, 40), st.sampled_from([0.0, 1.0]))
def test_ties_go_to_the_lower_id(values: list[int], top_k: int, temperature: float) -> None:
    logits_V = torch.tensor(values, dtype=torch.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, seed=3)
    [result] = LogitsProcessor(len(values), CPU).process(logits_V[None].clone(), [row(params, registered=False)])
    ids = np.frombuffer(result.candidate_ids, dtype="<i4").tolist()
    assert ids == sorted(range(len(values)), key=lambda i: (-values[i], i))[: len(ids)]
    if temperature == 0:
        assert choose(result, params, choice_index=0, position=0).token_id == ids[0]


def test_greedy_alone_and_among_others_is_the_same() -> None:
    logits_RV = torch.randn(4, 700, generator=torch.Generator().manual_seed(4))
    greedy = SamplingParams(temperature=0, num_logprobs=3)
    plain = LogitsProcessor(700, CPU).process(logits_RV.clone(), [row(greedy)] * 4)
    mixed = LogitsProcessor(700, CPU).process(
        logits_RV.clone(), [row(greedy)] * 3 + [row(replace(greedy, temperature=1.0))]
    )
    for i in range(3):
        first, second = (choose(r[i], greedy, choice_index=0, position=0) for r in (plain, mixed))
        assert first == second
        assert first.token_id == int(logits_RV[i].argmax())
        logprobs_V = torch.log_softmax(logits_RV[i].double(), dim=-1)
        assert first.logprobs is not None
        assert first.logprobs.logprob == pytest.approx(float(logprobs_V.max()), abs=1e-5)
        assert [t for t, _ in first.logprobs.top] == logprobs_V.topk(3).indices.tolist()


def test_counting_row_by_row_equals_a_registration_and_running_a_step_again_changes_nothing() -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.25, seed=1)
    logits_V = torch.randn(100, generator=torch.Generator().manual_seed(5))
    steps = LogitsProcessor(100, CPU)
    first = make_sampling(params, choice_index=0, output_position=0, registration=(PROMPT, ()))
    steps.process(logits_V[None].clone(), [(1, np.array(PROMPT, dtype=np.int32), len(PROMPT), first)])
    for count, token in enumerate(OUTPUT, start=1):
        asked = make_sampling(params, choice_index=0, output_position=count)
        for _ in range(2):  # the second time as after a resend
            [got] = steps.process(
                logits_V[None].clone(), [(1, np.array([token], dtype=np.int32), len(PROMPT) + count, asked)]
            )
    [at_once] = LogitsProcessor(100, CPU).process(logits_V[None].clone(), [row(params)])
    assert got == at_once


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits_RV = torch.randn(3, 50, generator=torch.Generator().manual_seed(6))
    logits_RV[1, 7] = bad
    if bad < 0:
        logits_RV[0, 7] = bad  # one -inf is a masked token, a whole row of them leaves nothing
        logits_RV[1] = bad
    results = LogitsProcessor(50, CPU).process(logits_RV, [row(SamplingParams(seed=1))] * 3)
    assert [r.non_finite for r in results] == [False, True, False]
    with pytest.raises(InternalError, match="no finite value"):
        choose(results[1], SamplingParams(seed=1), choice_index=0, position=0)


def test_the_bitmask_leaves_only_what_it_allows() -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(7))
    request = row(SamplingParams(seed=1))
    mask = np.zeros(50, dtype=np.uint8)
    mask[[13, 40]] = 1
    request[3].allowed_token_bitmask = np.packbits(mask, bitorder="little").tobytes()
    [result] = LogitsProcessor(50, CPU).process(logits_V[None].clone(), [request])
    head = kept_probabilities(result, SamplingParams(seed=1))
    assert set(np.frombuffer(result.candidate_ids, dtype="<i4")[np.flatnonzero(head)]) == {13, 40}
