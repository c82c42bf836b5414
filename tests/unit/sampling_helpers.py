"""Rows of logits, and what a stage makes of them for the gateway to choose from."""

from __future__ import annotations

import numpy as np
import torch

from gateway.sampling import make_sampling
from gateway.types import SamplingParams
from stages.logits import LogitsProcessor

CPU = torch.device("cpu")
QWEN2_VOCAB = 152_064
PROMPT, OUTPUT = (3, 5, 5, 7), (11, 3, 11)


def row(params: SamplingParams, *, suppressed=(), position=3, registered=True, sequence_id=1, mask=b""):
    sampling = make_sampling(
        params, choice_index=0, output_position=position, suppressed=suppressed,
        registration=(PROMPT, OUTPUT) if registered and params.has_penalties() else None,
    )  # fmt: skip
    sampling.allowed_token_bitmask = mask
    return (sequence_id, np.array([OUTPUT[-1]], dtype=np.int32), len(PROMPT) + len(OUTPUT), sampling)


def normal(size, scale=1.0, seed=1) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def run(logits_RV: torch.Tensor, rows):
    return LogitsProcessor(logits_RV.shape[1], CPU).process(logits_RV.clone(), rows)


def candidate_ids(result) -> np.ndarray:
    return np.frombuffer(result.candidate_ids, dtype="<i4")
