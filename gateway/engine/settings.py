"""Limits of an engine, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """`max_step_*` bound one micro-batch, `max_waiting_sequences` the queue of one pipeline and that of the requests no
    pipeline has taken yet. `check_integrity` lets every idle scheduler verify its invariants (tests, debugging).
    """

    max_step_tokens: int = 2048
    max_step_sequences: int = 256
    max_waiting_sequences: int = 1024
    lease_s: float = 10.0
    canary_timeout_s: float = 120.0
    check_integrity: bool = False
