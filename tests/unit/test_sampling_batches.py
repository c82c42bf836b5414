"""What is chosen for a row does not depend on the rows beside it: neither on the stage nor in the gateway."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from sampling_helpers import QWEN2_VOCAB, normal, row, run

from gateway.sampling import choose, choose_rows
from gateway.sampling.kept import kept_probabilities
from gateway.types import SamplingParams
from stageline.errors import InternalError

chooser = importlib.import_module("gateway.sampling.choose")  # the package exports a function of that name

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, num_logprobs=3),
    SamplingParams(temperature=0, repetition_penalty=1.2),
    SamplingParams(seed=1),
    SamplingParams(seed=1, temperature=0.3, num_logprobs=0),
    SamplingParams(seed=2, top_p=0.95),
    SamplingParams(seed=2, top_p=0.3, num_logprobs=7),
    SamplingParams(seed=2, top_k=50, top_p=0.9),
    SamplingParams(seed=3, top_k=300),
    SamplingParams(seed=3, min_p=0.05),
    SamplingParams(seed=3, min_p=0.5),
    SamplingParams(seed=4, top_k=6000, top_p=0.99),
    SamplingParams(seed=4, logit_bias=((9, 2.5),), frequency_penalty=0.5),
    SamplingParams(seed=5, temperature=1.4, top_p=0.8, presence_penalty=0.5),
]


@pytest.mark.parametrize("vocab", [QWEN2_VOCAB, 9001])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_every_batch(vocab: int, rounded: bool) -> None:
    """Alone and among 40 others, at another place, with one thread and with two."""
    logits_RV = normal((len(MIXED), vocab), 0.8, seed=10)
    logits_RV[::2] *= 4
    if rounded:
        logits_RV = logits_RV.bfloat16().float()
    rows = [row(params, sequence_id=i) for i, params in enumerate(MIXED)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [run(logits_RV[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
        order = [(5 * i + 3) % len(rows) for i in range(41)]
        for number in (1, 2):
            torch.set_num_threads(number)
            for i, result in zip(order, run(logits_RV[order], [rows[i] for i in order]), strict=True):
                assert result.SerializeToString(deterministic=True) == alone[i].SerializeToString(deterministic=True)
            assert [run(logits_RV[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))] == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("vocab", [60, 300, 9001, QWEN2_VOCAB])
def test_choosing_together_is_choosing_one_by_one(vocab: int) -> None:
    params = [replace(MIXED[i % len(MIXED)], seed=i) for i in range(3 * len(MIXED))]
    logits_RV = normal((len(params), vocab), 2.0, seed=11)
    logits_RV[5] = torch.nan
    logits_RV[20] = -torch.inf
    positions = [7 * i for i in range(len(params))]
    rows = [row(p, sequence_id=i, position=positions[i]) for i, p in enumerate(params)]
    results = run(logits_RV, rows)
    together = choose_rows(results, params, choice_indices=[i % 3 for i in range(len(params))], positions=positions)
    assert [i for i, choice in enumerate(together) if isinstance(choice, InternalError)] == [5, 20]
    for i, choice in enumerate(together):
        if i not in (5, 20):
            assert choice == choose(results[i], params[i], choice_index=i % 3, position=positions[i])


def test_choosing_at_the_boundaries_is_the_same_together(monkeypatch) -> None:
    """Random numbers that fall exactly on the sums."""
    monkeypatch.setattr(chooser, "_FEWEST", 1)
    params = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=7), SamplingParams(min_p=0.1)]
    results = run(normal((4, 600), 2.0), [row(p) for p in params])
    for share in (0.0, 0.1, 0.5, 0.9, np.nextafter(1, 0)):
        for i, p in enumerate(params):
            cdf = np.cumsum(kept_probabilities(results[i], p))
            number = float(min(cdf[int(share * len(cdf))], np.nextafter(1, 0)))
            monkeypatch.setattr(chooser, "uniform", lambda *_, u=number: u)
            monkeypatch.setattr(chooser, "uniforms", lambda *_, u=number: np.array([u]))
            alone = choose(results[i], p, choice_index=0, position=0)
            assert choose_rows([results[i]], [p], choice_indices=[0], positions=[0]) == [alone]
