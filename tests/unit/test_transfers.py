"""CUDA's transfers against a device that does nothing before it has to, and the CPU's against the plain arrays.

The device's streams keep what they are given in queues. Something runs only when the host waits for it, or when a stream
runs that was told to wait for it: so a copy that nobody waits for never happens, and a read before its copy reads zeros.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from stages.transfers import CudaTransfers, NoTransfers

ARRAYS = (
    np.arange(5, dtype=np.int32),
    np.zeros(0, dtype=np.int64),
    np.arange(12, dtype=np.int64).reshape(3, 4),
    np.array([7], dtype=np.int32),
    torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),  # not contiguous
)


class LazyStream:
    """A queue of copies and of waits for other streams."""

    def __init__(self) -> None:
        self.queue: list = []

    def wait_stream(self, other: LazyStream) -> None:
        length = len(other.queue)
        self.queue.append(lambda: other.run(length))

    def run(self, length: int | None = None) -> None:
        for index in range(len(self.queue) if length is None else length):
            work, self.queue[index] = self.queue[index], lambda: None
            work()


class LazyCuda:
    """Stands in for `torch.cuda`."""

    def __init__(self) -> None:
        self.computing = self.current = LazyStream()
        self.recorded: list[tuple[int, LazyStream]] = []

    def Stream(self, device: torch.device) -> LazyStream:
        return LazyStream()

    def Event(self) -> LazyEvent:
        return LazyEvent()

    def current_stream(self, device: torch.device) -> LazyStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: LazyStream):
        before, self.current = self.current, stream
        yield
        self.current = before


class LazyEvent:
    def record(self, stream: LazyStream) -> None:
        self._stream, self._length = stream, len(stream.queue)

    def synchronize(self) -> None:
        self._stream.run(self._length)


class Transfers(CudaTransfers):
    def _pinned(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LazyCuda:
    fake, copy, empty = LazyCuda(), torch.Tensor.copy_, torch.empty

    def copy_(self, source, non_blocking=False):
        if not non_blocking:
            return copy(self, source)
        fake.current.queue.append(lambda: copy(self, source))
        return self

    def record_stream(self, stream):
        fake.recorded.append((self.untyped_storage().data_ptr(), stream))

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).zero_())
    return fake


def same(given, got: torch.Tensor) -> bool:
    expected = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    return (got.dtype, got.shape) == (expected.dtype, expected.shape) and torch.equal(got, expected)


def test_arrays_are_on_the_device_for_what_is_computed_next(cuda: LazyCuda) -> None:
    arrays = [array.copy() if isinstance(array, np.ndarray) else array for array in ARRAYS]
    arrived = Transfers(torch.device("cpu"), cuda).to_device(arrays)
    arrays[0][:] = -1  # theirs again as soon as the call returns
    assert not arrived[2].any(), "the host did not wait for the copy"
    seen: list[bool] = []
    cuda.computing.queue.append(lambda: seen.append(all(map(same, ARRAYS, arrived))))
    cuda.computing.run()
    assert seen == [True]
    assert (arrived[0].untyped_storage().data_ptr(), cuda.computing) in cuda.recorded


def test_all_arrays_of_a_step_go_in_one_aligned_copy(cuda: LazyCuda) -> None:
    transfers = Transfers(torch.device("cpu"), cuda)
    arrived = transfers.to_device(ARRAYS)
    assert len(transfers._up.queue) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in arrived}) == 1
    offsets = [tensor.storage_offset() * tensor.element_size() for tensor in arrived]
    assert all(offset % 16 == 0 for offset in offsets)


def test_a_result_comes_after_what_computes_it_and_the_host_waits_for_it_alone(cuda: LazyCuda) -> None:
    transfers = Transfers(torch.device("cpu"), cuda)
    result = torch.zeros(3, 5, dtype=torch.bfloat16)
    cuda.computing.queue.append(lambda: result.fill_(2.5))
    wait = transfers.to_host(result)
    later: list[str] = []
    cuda.computing.queue.append(lambda: later.append("the next step"))
    assert not result.any(), "nothing ran yet"
    host = wait()
    assert same(torch.full((3, 5), 2.5, dtype=torch.bfloat16), host)
    assert not later, "the host waited for more than the result"
    assert (result.untyped_storage().data_ptr(), transfers._down) in cuda.recorded
    assert same(host, wait()), "asking twice is harmless"


def test_without_a_device_nothing_moves() -> None:
    transfers = NoTransfers()
    arrived = transfers.to_device(ARRAYS)
    assert all(map(same, ARRAYS, arrived))
    assert arrived[0].data_ptr() == ARRAYS[0].ctypes.data
    assert transfers.to_host(arrived[2])() is arrived[2]
