"""Tensors out of safetensors files by plain reads: no mapped pages, which would count as the process's memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stageline.errors import CheckpointError
from stages.safetensors_header import read_header

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_BYTES = (
    4 << 20
)  # what is cast or sent to a device passes through a buffer of this size: it stays in the CPU's cache
DIRECT_BYTES = 64 << 20  # of one read straight to its place


@dataclass(frozen=True, slots=True)
class FilePart:
    """One tensor's bytes: [begin, end) of the file at `path`."""

    name: str
    path: Path
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def find_parts(paths: Iterable[Path], names: set[str]) -> list[FilePart]:
    """Where the tensors of `names` lie in these files; one that is in none of them is left out. Raises as `read_header`."""
    parts = []
    for path in paths:
        header = read_header(path)
        parts += [
            FilePart(name, path, info.begin, info.end, DTYPES[info.dtype], info.shape)
            for name, info in header.tensors.items()
            if name in names
        ]
    return parts


def read_into(part: FilePart, target: torch.Tensor) -> None:
    """Fill a contiguous tensor of the part's shape, in any dtype and on any device. Raises CheckpointError."""
    assert tuple(target.shape) == part.shape, f"{part.name} passed verification with another shape"
    flat = target.reshape(-1)
    if target.device.type == "cpu" and target.dtype == part.dtype:
        raw: Any = flat.view(torch.uint8).numpy()
        _read(part, memoryview(raw), DIRECT_BYTES)
        return
    buffer = bytearray(min(CHUNK_BYTES, part.end - part.begin))
    done = 0
    for count in _read_chunks(part, memoryview(buffer)):
        chunk = torch.frombuffer(buffer, dtype=part.dtype, count=count // part.dtype.itemsize)
        flat.narrow(0, done, len(chunk)).copy_(chunk)
        done += len(chunk)


def parts_differ(one: FilePart, other: FilePart) -> bool:
    """Whether two parts hold other bytes; looked at a chunk at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    buffers = tuple(bytearray(min(CHUNK_BYTES, one.end - one.begin)) for _ in range(2))
    chunks = (_read_chunks(part, memoryview(buffer)) for part, buffer in zip((one, other), buffers, strict=True))
    return any(buffers[0][:count] != buffers[1][:count] for count, _ in zip(*chunks, strict=True))


def _read_chunks(part: FilePart, buffer: memoryview) -> Iterator[int]:
    """Bring the part into the buffer piece by piece; yields the length of each."""
    for begin in range(part.begin, part.end, len(buffer) or 1):
        count = min(len(buffer), part.end - begin)
        piece = FilePart(part.name, part.path, begin, begin + count, part.dtype, part.shape)
        _read(piece, buffer[:count], count)
        yield count


def _read(part: FilePart, into: memoryview, at_once: int) -> None:
    """Read the part's bytes to the beginning of `into`, at most so many with one call."""
    done, size = 0, part.end - part.begin
    try:
        with open(part.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), part.begin, size, os.POSIX_FADV_SEQUENTIAL)
            while done < size:
                count = os.preadv(file.fileno(), [into[done : min(size, done + at_once)]], part.begin + done)
                if count == 0:
                    raise OSError(f"it ends at byte {part.begin + done}, {part.name} goes on to {part.end}")
                done += count
    except OSError as error:
        raise CheckpointError(
            "SHARD_UNREADABLE",
            f"shard {part.path} cannot be read: {error}",
            shard=part.path.name,
            path=part.path,
        ) from None
