"""What a scheduler may do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one micro-batch (`max_step_*`, `min_prefill_tokens`) and of one pipeline (the others).

    `min_prefill_tokens` is the least prefill a micro-batch carries while prompts wait and `max_step_tokens` leaves room.
    `max_request_kv_fraction`: while others wait, a request that holds more of the KV cache is not given more of it.
    `prefix_caching` lets sequences share the blocks of common prefixes.
    """

    max_step_tokens: int = 2048
    max_step_sequences: int = 256
    min_prefill_tokens: int = 16
    max_waiting_sequences: int = 1024
    max_waiting_tokens: int = 1 << 20
    max_request_kv_fraction: float = 0.5
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        bounds = (self.max_step_tokens, self.max_step_sequences, self.min_prefill_tokens)
        assert min(*bounds, self.max_waiting_sequences, self.max_waiting_tokens) > 0
        assert 0 < self.max_request_kv_fraction <= 1
