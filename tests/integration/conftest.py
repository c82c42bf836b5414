"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from doors_helpers import Doors, open_doors
from engine_helpers import Cluster
from postgres_server import PostgresServer, programs
from process_nursery import Nursery, ToyGateway, nursery


@pytest.fixture
async def cluster(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Cluster]:
    """Toy stages and an engine over them, as a test adds them; none of our own invariants may break meanwhile."""
    running = Cluster()
    yield running
    await running.stop()
    # Recovery would hide them: a broken invariant of ours breaks the pipeline, and the next epoch computes again.
    assert "AssertionError" not in caplog.text
    assert "unexpected error" not in caplog.text


@pytest.fixture
async def doors() -> AsyncIterator[Doors]:
    """Both doors over an engine that a test scripts."""
    async with open_doors(Doors()) as opened:
        yield opened


@pytest.fixture
async def client(doors: Doors) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client at the HTTP door."""
    async with openai.AsyncOpenAI(base_url=f"{doors.http}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
async def web(doors: Doors) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client at the HTTP door."""
    async with httpx.AsyncClient(base_url=doors.http, timeout=10) as opened:
        yield opened


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    """Starts processes for the tests of one file, and ends all of them."""
    with nursery() as running:
        yield running


@pytest.fixture
def gateway(children) -> Iterator[ToyGateway]:
    """A whole gateway process with small stages."""
    with children.toy_gateway() as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A database server of our own; skips where PostgreSQL is not installed."""
    if programs() is None:
        pytest.skip("PostgreSQL's server programs (initdb, postgres) are not installed")
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty batch state of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()
