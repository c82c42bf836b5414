"""Between host and device without waiting: one small interface, for the CPU (nothing to move) and for CUDA.

CUDA: bytes go through pinned memory on a stream of their own for each direction, so that they overlap with computing
(CUDA C++ Programming Guide, "Asynchronous Concurrent Execution"). Events order the streams; the host waits in one place
only, for a result that it needs. Pinned memory comes from torch's caching host allocator, which gives a block to the next
transfer only after the copies that use it have ended. This build of torch and these tests have no GPU: what runs here is
the CPU's side, and CUDA's against a recording of its calls. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN_BYTES = 16  # every array of a transfer begins at a multiple: the widest element has 8, kernels like 16


class Transfers(Protocol):
    """Moves a step's numbers to the device and its result back."""

    def to_device(self, arrays: Sequence[NDArray[Any] | Tensor]) -> list[Tensor]:
        """The arrays, in their shapes and dtypes, for work that is queued from now on. They may be changed at once."""
        ...

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to bring a contiguous tensor to the host; the function waits until it is there."""
        ...


class NoTransfers:
    """The device is the host. Tensors share the arrays' memory: `arrays` must stay as they are while the step runs."""

    def to_device(self, arrays: Sequence[NDArray[Any] | Tensor]) -> list[Tensor]:
        """See Transfers."""
        return [torch.from_numpy(array) if isinstance(array, np.ndarray) else array for array in arrays]

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See Transfers."""
        return lambda: tensor


class CudaTransfers:
    """`cuda` is `torch.cuda`, or what stands in for it; the current stream is the one that computes."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._up, self._down = cuda.Stream(device), cuda.Stream(device)

    def to_device(self, arrays: Sequence[NDArray[Any] | Tensor]) -> list[Tensor]:
        """See Transfers. All of them in one copy: a step has many small arrays."""
        hosts = [torch.from_numpy(array) if isinstance(array, np.ndarray) else array for array in arrays]
        starts, size = [], 0
        for host in hosts:
            starts.append(size)
            size += -(-host.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        staged = self._pinned(size)
        for start, host in zip(starts, hosts, strict=True):
            if host.nbytes:  # an empty array has strides that no view takes
                _bytes(staged, start, host.nbytes).copy_(host.contiguous().view(-1).view(torch.uint8))
        with self._cuda.stream(self._up):
            arrived = torch.empty(size, dtype=torch.uint8, device=self._device)
            arrived.copy_(staged, non_blocking=True)
        computing = self._cuda.current_stream(self._device)
        computing.wait_stream(self._up)
        arrived.record_stream(
            computing
        )  # made on the other stream: its memory may not be used again before this one is done
        return [
            _bytes(arrived, start, host.nbytes).view(host.dtype).view(host.shape)
            for start, host in zip(starts, hosts, strict=True)
        ]

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See Transfers."""
        staged = self._pinned(tensor.nbytes)
        self._down.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._down):
            staged.copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
            copied = self._cuda.Event()
            copied.record(self._down)
        tensor.record_stream(self._down)

        def wait() -> Tensor:
            copied.synchronize()
            return staged.view(tensor.dtype).view(tensor.shape)

        return wait

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def transfers_for(device: torch.device) -> Transfers:
    """The ones of this device."""
    return CudaTransfers(device) if device.type == "cuda" else NoTransfers()


def _bytes(whole: Tensor, start: int, size: int) -> Tensor:
    return whole.narrow(0, start, size)
