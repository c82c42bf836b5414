"""The distribution that stage and gateway sample together equals transformers' processors over the full softmax."""

import itertools

import numpy as np
import pytest
import torch
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
from stages.logits import LogitsProcessor
from stages.logits import processor as stage

PROMPT, OUTPUT = (3, 5, 7, 7), (5, 9, 9)


def reference(raw_V, params, suppressed):
    x_1V = raw_V.clone()[None]
    x_1V[0, list(suppressed)] = -torch.inf
    for token, value in params.logit_bias:
        x_1V[0, token] += value
    if params.repetition_penalty != 1:
        x_1V = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([PROMPT + OUTPUT]), x_1V)
    for token in set(OUTPUT):
        x_1V[0, token] -= params.frequency_penalty * OUTPUT.count(token) + params.presence_penalty
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    for warper in warpers:
        x_1V = warper(None, x_1V)
    return torch.softmax(x_1V[0].double(), -1).numpy()


def run(raw_V, params, suppressed=()):
    sampling = make_sampling(
        params, choice_index=0, output_position=3, suppressed=suppressed, registration=(PROMPT, OUTPUT)
    )
    row = (1, np.array(OUTPUT[-1:], np.int32), len(PROMPT + OUTPUT), sampling)
    return LogitsProcessor(len(raw_V), torch.device("cpu")).process(raw_V.clone()[None], [row])[0]


CASES = list(itertools.product((50, 1000), (0.7, 1.5), (0, 20, 200), (1.0, 0.9), (0.0, 0.02), (False, True))) + [
    (152_064, 1.0, k, p, m, False) for k, p, m in [(0, 1.0, 0.0), (0, 0.9, 0.0), (9000, 0.8, 0.0), (0, 1.0, 0.3)]
]


@pytest.mark.parametrize(("vocab", "temperature", "top_k", "top_p", "min_p", "extras"), CASES)
def test_equals_the_reference(monkeypatch, vocab, temperature, top_k, top_p, min_p, extras):
    scale = 0.2 if vocab > 100_000 else 2.0
    raw_V = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64).mul(scale).float()
    more = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3, "logit_bias": ((11, 2.0),)}
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **(more if extras else {}))
    suppressed = (2, 4) if extras else ()
    expected_V = reference(raw_V, params, suppressed)
    result = run(raw_V, params, suppressed)
    got = kept_probabilities(result, params)
    ids = np.frombuffer(result.candidate_ids, "<i4")[: len(got)]
    np.testing.assert_allclose(got, expected_V[ids], rtol=1e-3 if vocab > 100_000 else 2e-5, atol=1e-9)
    rest_V = expected_V.copy()
    rest_V[ids] = 0
    assert abs(got.sum() + rest_V.sum() - 1) < 1e-4
    assert result.HasField("tail") == (rest_V.sum() > 1e-6)
    if result.HasField("tail"):
        order = np.argsort(-rest_V, kind="stable")
        cdf = rest_V[order].cumsum() / rest_V.sum()
        for u in (0.0, 0.25, 0.5, 0.99):
            monkeypatch.setattr(stage, "uniform", lambda *_, u=u: u)
            place = int(np.flatnonzero(order == run(raw_V, params, suppressed).tail.token_id)[0])
            assert (cdf[place - 1] if place else 0) - 1e-3 <= u <= cdf[place] + 1e-3


def test_ties_go_to_the_lowest_ids_and_greedy_is_the_first():
    result = run(torch.zeros(200), SamplingParams(temperature=1.0, top_k=8))
    assert np.frombuffer(result.candidate_ids, "<i4").tolist() == list(range(8))
    greedy = SamplingParams(temperature=0.0)
    assert choose(run(torch.zeros(200), greedy), greedy, choice_index=0, position=0).token_id == 0
