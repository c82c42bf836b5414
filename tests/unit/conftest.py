"""What the tests of compiled functions share. numba is imported where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def _on_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def on_threads():
    """A context in which torch has so many threads."""
    return _on_threads


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def functions(request):
    """Those for heads of 16, and their dtype."""
    from stages.compiled.functions import CompiledFunctions

    return CompiledFunctions(request.param, 16), request.param


@pytest.fixture(params=[1, 1 << 16], ids=["on two threads", "on one"])
def threads(request, monkeypatch: pytest.MonkeyPatch):
    """From how many elements on more than one thread works."""
    monkeypatch.setattr("stages.compiled.functions.PARALLEL_ELEMENTS", request.param)
    with _on_threads(2):
        yield


@pytest.fixture
def for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled functions also for tiny models."""
    monkeypatch.setattr("stages.compiled.choice.COMPILED_FROM_PARAMETERS", 0)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch, for_all_sizes) -> None:
    """And compiled products on every processor."""
    monkeypatch.setattr("stages.compiled.functions.onednn_is_faster", lambda _: False)
