"""The batch service of a gateway, as its configuration says."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.api.service import Frontend
from gateway.batch.connection import State
from gateway.batch.database import Database
from gateway.batch.run_line import LineRunner
from gateway.batch.service import BatchService
from gateway.batch.sqlite import LOCK_TIMEOUT_S, SqliteState
from gateway.batch.state_url import parse_url
from gateway.config import BatchSection
from stageline.errors import ConfigError


async def open_batches(frontend: Frontend, settings: BatchSection) -> BatchService | None:
    """A running service, or None where there is no place for its state. Raises ConfigError for one that cannot be used."""
    if settings.state_url is None:
        return None
    database = await asyncio.to_thread(Database, open_state(settings.state_url))
    service = BatchService(
        database,
        LineRunner(frontend),
        max_concurrency=settings.max_concurrency,
        max_lines=settings.max_lines,
        max_file_bytes=settings.max_file_bytes,
    )
    await service.start()
    return service


def check_state(settings: BatchSection) -> None:
    """Whether a server that starts now could own the state. Raises ConfigError as `open_batches`, before anything has started."""
    if settings.state_url is not None:
        state = open_state(settings.state_url)
        state.open_writer().close()
        state.release()


def open_state(url: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> State:
    """The place that `batch.state_url` names; nothing is opened yet. Raises ConfigError."""
    place = parse_url(url)
    if isinstance(place, Path):
        return SqliteState(place, lock_timeout_s=lock_timeout_s)
    try:
        from gateway.batch.postgres import PostgresState
    except ImportError as error:
        raise ConfigError(
            "POSTGRES_NOT_INSTALLED", f"batch.state_url names PostgreSQL: it needs `pip install 'stageline[postgres]'`: {error}",
            field="batch.state_url",
        ) from None  # fmt: skip
    return PostgresState(place, lock_timeout_s=lock_timeout_s)
