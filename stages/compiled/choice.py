"""Whether a stage runs compiled functions; numba is imported only where it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.compiled import UNROLL
from stages.config import ModelConfig
from stages.partition import LayerRange, num_parameters

if TYPE_CHECKING:
    from stages.compiled.decode import DecodeSteps
    from stages.compiled.functions import CompiledFunctions
    from stages.kv_cache import KVCache
    from stages.models.qwen2 import Qwen2Stage

COMPILED_FROM_PARAMETERS = 5_000_000
"""Importing numba takes half a second, and seconds where nothing was compiled before: stages of fewer parameters are for tests."""


def compiled_functions(
    config: ModelConfig, layers: LayerRange, *, dtype: torch.dtype, device: torch.device, block_size_tokens: int
) -> tuple[CompiledFunctions | None, str]:
    """The functions, or None; and why not, where they would have been taken."""
    if device.type != "cpu" or num_parameters(config, layers) < COMPILED_FROM_PARAMETERS:
        return None, ""
    if block_size_tokens % UNROLL or config.head_dim % 2:
        wanted = f"kv_cache.block_size_tokens in multiples of {UNROLL} and an even head size"
        return None, f"compiled functions want {wanted}"
    try:
        from stages.compiled.functions import CompiledFunctions

        return CompiledFunctions(dtype, config.head_dim), ""
    except (ImportError, OSError, RuntimeError) as error:  # no numba, another OpenMP, a processor unknown to LLVM
        return None, f"compiled functions are not used: {error}"


def decode_steps(functions: CompiledFunctions, model: Qwen2Stage, kv: KVCache) -> DecodeSteps | None:
    """Steps with one call, where every layer of the model, which is loaded, is made of compiled functions."""
    from stages.compiled.decode import DecodeSteps

    return DecodeSteps(functions, model, kv) if DecodeSteps.possible(model) else None
