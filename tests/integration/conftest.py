"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from process_nursery import Nursery, ToyGateway, nursery


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
