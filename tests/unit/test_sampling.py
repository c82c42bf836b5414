"""The choice is exact: the deterministic sampler, integrated over its random numbers, is the processed softmax.

The reference is transformers' processors over full rows; the slow twin of every shortcut is a sort of the whole row.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_helpers import CPU, OUTPUT, PROMPT, QWEN2_VOCAB, candidate_ids, normal, row, run
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gateway.sampling import choose, choose_rows, make_sampling
from gateway.sampling.kept import kept_probabilities
from gateway.types import SamplingParams
from stageline.errors import InternalError, InvalidArgumentError
from stages.logits import LogitsProcessor, check_sampling
from stages.logits.edits import edit
from stages.logits.history import PenaltyHistory
from stages.logits.mass import draw, logsumexp, mass, new_weights, weights
from stages.logits.top import first_maximum, top


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


def processed(logits_V: torch.Tensor, request) -> torch.Tensor:
    """Mask, bias, penalties and temperature on one row, float64, relative to the highest."""
    x_RV = logits_V[None].clone()
    edit(x_RV, [request], PenaltyHistory())
    return ((x_RV[0] - x_RV[0].max()) / request[3].temperature).double()


def kept_ids(x_V: torch.Tensor, sampling) -> np.ndarray:
    """The slow twin of every cut: the whole row sorted."""
    values, order = torch.sort(x_V, descending=True, stable=True)
    kept = int(torch.isfinite(values).sum())
    kept = min(kept, sampling.top_k or kept)
    if sampling.top_p < 1:
        mass_V = torch.softmax(values[:kept], dim=-1)
        kept = max(1, int((mass_V.cumsum(0) - mass_V < sampling.top_p).sum()))
    if sampling.min_p > 0:
        kept = max(1, int((values[:kept] >= math.log(sampling.min_p)).sum()))
    return order[:kept].numpy()


def integrated(logits_V: torch.Tensor, params: SamplingParams, suppressed=()) -> np.ndarray:
    """What the sampler does over all random numbers: the gateway's intervals, and the stage's draw within the tail."""
    request = row(params, suppressed=suppressed)
    [result] = run(logits_V[None], [request])
    ids, head = candidate_ids(result), kept_probabilities(result, params)
    total = np.zeros(len(logits_V))
    total[ids[: len(head)]] = head
    if result.HasField("tail"):
        x_V = processed(logits_V, request)
        rest = np.setdiff1d(kept_ids(x_V, request[3]), ids)
        total[rest] = np.exp(x_V.numpy()[rest] - result.tail.kept_logsumexp)
        assert result.tail.token_id in rest
        assert result.tail.raw_logit == logits_V[result.tail.token_id]
    assert total.sum() == pytest.approx(1, abs=2e-6)
    return total


GRID = [
    SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition,
        frequency_penalty=other, presence_penalty=other / 2, logit_bias=((2, 1.5), (9, -3.0)), seed=5,
    )
    for temperature, top_k, top_p, min_p, repetition, other in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 5, 200), (1.0, 0.9, 0.3), (0.0, 0.05), (1.0, 1.3), (0.0, 0.7)
    )
]  # fmt: skip


@pytest.mark.parametrize(("vocab", "scale"), [(500, 0.05), (500, 3.0), (1024, 0.05), (50, 1.0)])
def test_every_combination_is_the_processed_softmax(vocab: int, scale: float) -> None:
    for seed, params in enumerate(GRID):
        logits_V = normal(vocab, scale, seed)
        if params.top_k > vocab:
            params = replace(params, top_k=0)  # the same, and transformers takes it
        np.testing.assert_allclose(
            integrated(logits_V, params, suppressed=(4,)), reference(logits_V, params, suppressed=(4,)), atol=2e-6,
            err_msg=str(params),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("params", "scale", "most"),
    [
        (SamplingParams(), 0.3, 64),
        (SamplingParams(top_k=50), 0.3, 50),
        (SamplingParams(top_k=100, top_p=0.9), 0.3, 100),
        (SamplingParams(top_p=0.95), 6.0, 4096),
        (SamplingParams(top_p=0.9), 4.0, 4096),
        (SamplingParams(top_p=0.9), 3.2, 4096),
        (SamplingParams(top_p=0.95), 0.3, 4096),  # a nucleus of 140,000 tokens
        (SamplingParams(top_p=0.1), 0.3, 4096),
        (SamplingParams(top_p=0.5, temperature=0.7), 0.3, 4096),
        (SamplingParams(min_p=0.2), 0.3, 4096),
        (SamplingParams(min_p=0.02), 0.3, 4096),
        (SamplingParams(min_p=0.02), 4.0, 4096),
        (SamplingParams(min_p=0.3, top_p=0.999), 0.3, 4096),
        (SamplingParams(top_k=4096, top_p=0.9), 0.3, 4096),
        (SamplingParams(top_k=10_000), 0.3, 4096),
        (SamplingParams(top_k=10_000, top_p=0.9), 0.3, 4096),
        (SamplingParams(top_k=10_000, top_p=0.3), 0.3, 4096),  # the nucleus ends within, measured over 10,000
        (SamplingParams(top_k=10_000, top_p=0.9, min_p=0.5), 0.3, 4096),
        (SamplingParams(top_k=10_000, min_p=0.9), 0.3, 4096),
    ],
    ids=str,
)
def test_a_row_gets_as_many_candidates_as_its_cut_needs(params: SamplingParams, scale: float, most: int) -> None:
    logits_V = normal(QWEN2_VOCAB, scale, seed=2)
    np.testing.assert_allclose(integrated(logits_V, params), reference(logits_V, params), atol=2e-6)
    [result] = run(logits_V[None], [row(params)])
    kept = len(kept_ids(processed(logits_V, row(params)), row(params)[3]))
    assert min(most, kept) <= len(candidate_ids(result)) <= min(most, kept + 1)
    assert result.HasField("tail") == (kept > most)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    """The whole way, random numbers included: 20,000 positions of one seed, chi-square over a tail-heavy row."""
    logits_V = normal(300, seed=3)
    params = SamplingParams(seed=9)
    counts, draws = np.zeros(300), 20_000
    for start in range(0, draws, 500):
        positions = range(start, start + 500)
        results = run(logits_V.expand(500, -1), [row(params, position=position) for position in positions])
        chosen = choose_rows(results, [params] * 500, choice_indices=[0] * 500, positions=positions)
        np.add.at(counts, [choice.token_id for choice in chosen], 1)
    expected = reference(logits_V, params) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 300 + 5 * np.sqrt(2 * 300)


def test_the_draw_by_index_is_the_inverse_cdf_of_the_whole_row() -> None:
    x_V = normal(5000, 3.0, seed=8)
    x_V[normal(5000, seed=9) > 0.5] = -torch.inf
    x_V -= x_V.max()
    cdf = np.cumsum(np.exp(x_V.double().numpy()))
    numbers = np.append(np.linspace(0, 1, 4000, endpoint=False), [np.nextafter(1, 0), 0.0])
    w_RCL = weights(x_V[None], new_weights(1, 5000, CPU)).expand(len(numbers), -1, -1).contiguous()
    got = draw(w_RCL, torch.from_numpy(numbers)).numpy()
    assert torch.isfinite(x_V[got]).all()
    share, before = cdf / cdf[-1], np.append(0, cdf / cdf[-1])
    assert (numbers <= share[got] + 1e-6).all()
    assert (numbers >= before[got] - 1e-6).all()
    exact = np.searchsorted(cdf, numbers * cdf[-1], side="right")
    assert (got == exact).mean() > 0.99  # the others stand within rounding of a boundary


def test_a_tail_of_one_token_is_drawn_wherever_it_stands() -> None:
    for place in (0, 511, 512, 999):
        w_RCL = torch.zeros(2, 2, 512)
        w_RCL.view(2, -1)[:, place] = 1e-30
        assert draw(w_RCL, torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)).tolist() == [place] * 2


@pytest.mark.parametrize("vocab", [7, 512, 1000, 151_936])
def test_sums_in_chunks_are_sums(vocab: int) -> None:
    x_RV = normal((3, vocab), 4.0)
    exact_R, room_RCL = x_RV.double().exp().sum(dim=-1), new_weights(5, vocab, CPU)
    torch.testing.assert_close(mass(weights(x_RV, room_RCL)), exact_R, rtol=1e-6, atol=0)
    torch.testing.assert_close(logsumexp(x_RV, x_RV.amax(-1), room_RCL), exact_R.log().float(), rtol=1e-6, atol=1e-6)


@settings(max_examples=150)
@given(st.sampled_from([1, 31, 32, 64, 1024, 8192, 30_000]), st.sampled_from([1, 2, 40, 64, 512]), st.integers(0, 99),
       st.sampled_from([2, 30, 10**6]))  # fmt: skip
def test_the_top_is_that_of_a_stable_sort(vocab: int, size: int, seed: int, distinct: int) -> None:
    x_RV = (torch.rand(3, vocab, generator=torch.Generator().manual_seed(seed)) * distinct).floor()
    x_RV[1, seed % vocab :] = -torch.inf
    size = min(size, vocab)
    values_RV, order_RV = torch.sort(x_RV, dim=-1, descending=True, stable=True)
    ids_RK, values_RK = top(x_RV, size)
    finite_RK = torch.isfinite(values_RV[:, :size])
    assert torch.equal(values_RK, values_RV[:, :size])
    assert torch.equal(ids_RK[finite_RK], order_RV[:, :size][finite_RK])
    best_R, first_R = first_maximum(x_RV)
    assert torch.equal(best_R, values_RV[:, 0])
    assert first_R[[0, 2]].tolist() == order_RV[[0, 2], 0].tolist()


@settings(max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.integers(0, 40), st.sampled_from([0.0, 1.0]))
def test_ties_go_to_the_lower_id(values: list[int], top_k: int, temperature: float) -> None:
    logits_V = torch.tensor(values, dtype=torch.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, seed=3)
    [result] = run(logits_V[None], [row(params, registered=False)])
    ids = candidate_ids(result).tolist()
    assert ids == sorted(range(len(values)), key=lambda i: (-values[i], i))[: len(ids)]
    if temperature == 0:
        assert choose(result, params, choice_index=0, position=0).token_id == ids[0]


def test_greedy_is_the_lowest_id_of_the_highest_logit_with_the_models_log_probabilities() -> None:
    logits_RV = normal((4, 704), seed=4)
    logits_RV[2, [600, 90]] = 9.0
    greedy = SamplingParams(temperature=0, num_logprobs=3)
    results = run(logits_RV, [row(greedy)] * 3 + [row(replace(greedy, temperature=1.0))])
    for i in range(3):
        choice = choose(results[i], greedy, choice_index=0, position=0)
        assert choice.token_id == (int(logits_RV[i].argmax()) if i < 2 else 90)
        logprobs_V = torch.log_softmax(logits_RV[i].double(), dim=-1)
        assert choice.logprobs is not None
        assert choice.logprobs.logprob == pytest.approx(float(logprobs_V.max()), abs=1e-5)
        values, ids = torch.sort(logprobs_V, descending=True, stable=True)
        assert [t for t, _ in choice.logprobs.top] == ids[:3].tolist()
        assert [v for _, v in choice.logprobs.top] == pytest.approx(values[:3].tolist(), abs=1e-5)


def test_counting_row_by_row_equals_a_registration_and_running_a_step_again_changes_nothing() -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.25, seed=1)
    logits_V = normal(100, seed=5)
    steps = LogitsProcessor(100, CPU)
    first = make_sampling(params, choice_index=0, output_position=0, registration=(PROMPT, ()))
    steps.process(logits_V[None].clone(), [(1, np.array(PROMPT, dtype=np.int32), len(PROMPT), first)])
    for count, token in enumerate(OUTPUT, start=1):
        asked = make_sampling(params, choice_index=0, output_position=count)
        for _ in range(2):  # the second time as after a resend
            [got] = steps.process(
                logits_V[None].clone(), [(1, np.array([token], dtype=np.int32), len(PROMPT) + count, asked)]
            )
    [at_once] = run(logits_V[None], [row(params)])
    assert got == at_once


@pytest.mark.parametrize("params", [SamplingParams(seed=1), SamplingParams(temperature=0)], ids=["drawn", "greedy"])
@pytest.mark.parametrize("vocab", [50, 64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float, vocab: int, params: SamplingParams) -> None:
    logits_RV = normal((3, vocab), seed=6)
    logits_RV[1, 7] = bad
    if bad < 0:
        logits_RV[0, 7] = bad  # one -inf is a masked token, a whole row of them leaves nothing
        logits_RV[1] = bad
    results = run(logits_RV, [row(params)] * 3)
    assert [r.non_finite for r in results] == [False, True, False]
    with pytest.raises(InternalError, match="no finite value"):
        choose(results[1], params, choice_index=0, position=0)


def test_the_bitmask_leaves_only_what_it_allows() -> None:
    logits_V = normal(50, seed=7)
    allowed = np.zeros(50, dtype=np.uint8)
    allowed[[13, 40]] = 1
    mask = np.packbits(allowed, bitorder="little").tobytes()
    [result] = run(logits_V[None], [row(SamplingParams(seed=1), mask=mask)])
    assert set(candidate_ids(result)[np.flatnonzero(kept_probabilities(result, SamplingParams(seed=1)))]) == {13, 40}
    [result] = run(logits_V[None], [row(SamplingParams(seed=1), mask=mask, suppressed=(13, 40))])
    assert result.non_finite  # nothing is left
    [result] = run(logits_V[None], [row(SamplingParams(temperature=0), mask=mask)])
    assert candidate_ids(result).tolist() == [13 if logits_V[13] > logits_V[40] else 40]


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e30])
def test_extreme_temperatures_are_the_limits(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=4)
    [result] = run(normal((1, 2000), 5.0), [row(params)])
    assert math.isfinite(result.processed_logsumexp)
    if temperature < 1:
        assert choose(result, params, choice_index=0, position=3).token_id == int(normal((1, 2000), 5.0).argmax())
    else:
        assert kept_probabilities(result, params) == pytest.approx([1 / 2000] * 64, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": math.nan}, {"top_p": -0.5},
        {"min_p": math.inf}, {"repetition_penalty": -1.0}, {"frequency_penalty": math.nan}, {"presence_penalty": math.inf},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_no_gateway_sends_are_refused(change: dict[str, float]) -> None:
    sampling = make_sampling(SamplingParams(), choice_index=0, output_position=0)
    check_sampling(sampling, 50)
    [(name, value)] = change.items()
    setattr(sampling, name, value)
    with pytest.raises(InvalidArgumentError, match=f"{name} must be finite"):
        check_sampling(sampling, 50)
