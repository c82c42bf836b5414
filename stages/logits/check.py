"""Whether a row's sampling can be carried out: an index out of range would end a GPU's context, not one step."""

from __future__ import annotations

import math

import numpy as np

from stageline.errors import InvalidArgumentError
from stageline.stage.v1 import stage_service_pb2 as pb

MAX_SCORED_LOGPROBS = 1024


def check_sampling(sampling: pb.Sampling, vocab_size: int) -> None:
    """Raises InvalidArgumentError (reason MALFORMED_STEP): ids out of the vocabulary, lists that do not fit, wrong numbers."""
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        value = getattr(sampling, name)
        may_be_negative = name in ("frequency_penalty", "presence_penalty")
        if not math.isfinite(value) or (value < 0 and not may_be_negative):
            raise _bad(f"{name} must be finite{'' if may_be_negative else ' and not negative'}, got {value}")
    for name in ("suppressed_token_ids", "bias_token_ids"):
        ids = getattr(sampling, name)
        if ids and max(ids) >= vocab_size:
            raise _bad(f"{name} must be in [0, {vocab_size}), got {max(ids)}")
    if len(sampling.bias_token_ids) != len(sampling.bias_values):
        raise _bad(f"{len(sampling.bias_token_ids)} bias_token_ids with {len(sampling.bias_values)} bias_values")
    mask, expected = sampling.allowed_token_bitmask, -(-vocab_size // 8)
    if mask and len(mask) != expected:
        raise _bad(f"allowed_token_bitmask must hold {expected} bytes, got {len(mask)}")
    if sampling.HasField("registration"):
        for name in ("prompt_token_ids", "output_token_ids"):
            raw = getattr(sampling.registration, name)
            if len(raw) % 4:
                raise _bad(f"registration.{name} must hold int32 values, got {len(raw)} bytes")
            tokens = np.frombuffer(raw, dtype="<i4")
            if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
                raise _bad(f"registration.{name} must be in [0, {vocab_size})")


def check_scoring(scoring: pb.Scoring) -> None:
    """Raises InvalidArgumentError (reason MALFORMED_STEP) for more alternatives than a result may carry. StepBatch checks
    the targets."""
    if scoring.num_logprobs > MAX_SCORED_LOGPROBS:
        raise _bad(f"scoring.num_logprobs must be at most {MAX_SCORED_LOGPROBS}, got {scoring.num_logprobs}")


def _bad(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("MALFORMED_STEP", f"malformed step: {message}")
