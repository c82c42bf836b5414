"""The traced call that is being served, if it is one."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from gateway.config import TracingSection
from stageline.errors import ConfigError

if TYPE_CHECKING:
    from gateway.tracing.spans import Call, Tracing

current: ContextVar[Call | None] = ContextVar("traced_call", default=None)


def open_tracing(section: TracingSection) -> Tracing | None:
    """None where traces are off: then nothing of opentelemetry is imported. Raises ConfigError where it is missing."""
    if not section.enabled:
        return None
    try:
        from gateway.tracing.spans import Tracing, otlp_provider
    except ImportError as error:
        raise ConfigError(
            "TRACING_NOT_INSTALLED", f"tracing.enabled needs `pip install 'stageline[tracing]'`: {error}",
            field="tracing.enabled",
        ) from None  # fmt: skip
    return Tracing(otlp_provider(section.endpoint, section.sample_ratio))
