"""The GGUF container: metadata and the table of tensors, without torch and without touching the tensor data.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: magic "GGUF", version, tensor count,
metadata count; the metadata (key, type, value); for each tensor its name, dimensions (innermost first), type and
offset; padding to the alignment; the data. We read it ourselves, not with `gguf.GGUFReader`, because that one makes an
array object of every vocabulary entry (seconds and hundreds of MiB, in every stage) and because a damaged file must
end in an error that says so.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stageline.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` is outermost first, as in Hugging Face; `begin` and `num_bytes` count in the file."""

    name: str
    shape: tuple[int, ...]
    quantization: gguf.GGMLQuantizationType
    begin: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says about itself. Strings of the metadata that are not UTF-8 keep their bytes as surrogates."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One tensor dequantized to float32, in its own memory, in its shape. Raises CheckpointError."""
        with self.path.open("rb") as file:
            file.seek(tensor.begin)
            raw = np.fromfile(file, dtype=np.uint8, count=tensor.num_bytes)
        if raw.size != tensor.num_bytes:
            raise _truncated(self.path, f"{tensor.name} ends at byte {tensor.begin + tensor.num_bytes}")
        try:
            values = gguf.dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.quantization)
        except NotImplementedError:
            raise CheckpointError(
                "TENSOR_DTYPE_NOT_SERVED",
                f"{self.path}: {tensor.name} has the type {tensor.quantization.name}, which cannot be dequantized",
                tensor=tensor.name,
                actual=tensor.quantization.name,
            ) from None
        return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)


def read_gguf(path: Path) -> GgufFile:
    """Read metadata and tensor table. Raises CheckpointError: GGUF_UNREADABLE, GGUF_TRUNCATED, GGUF_CORRUPT,
    GGUF_VERSION_NOT_SERVED."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data).read_file()
    except (OSError, ValueError) as error:  # mmap: ValueError for an empty file
        raise CheckpointError("GGUF_UNREADABLE", f"{path} cannot be read: {error}", path=path) from None
    except (struct.error, IndexError):
        raise _truncated(path, "its header goes on after the end of the file") from None


class _Cursor:
    """A position in the file; every read checks that the bytes are there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.offset = path, data, 0

    def read_file(self) -> GgufFile:
        if self.data[:4] != b"GGUF":
            raise _corrupt(self.path, "it does not start with 'GGUF'")
        self.offset = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                "GGUF_VERSION_NOT_SERVED",
                f"{self.path} is GGUF version {version}; versions 2 and 3, little endian, are served",
                path=self.path,
                version=version,
            )
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise _corrupt(self.path, f"the key {key!r} is there twice")
            metadata[key] = self.value(self.scalar("I"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _corrupt(self.path, f"general.alignment is {alignment!r}")
        entries = [self.tensor_entry() for _ in range(num_tensors)]
        data_start = -(-self.offset // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if name in tensors:
                raise _corrupt(self.path, f"the tensor {name!r} is there twice")
            if not shape or shape[-1] % block_size:
                raise _corrupt(self.path, f"{name} {list(shape)} is not whole blocks of {kind.name}")
            tensors[name] = GgufTensor(
                name, shape, kind, data_start + offset, math.prod(shape) // block_size * block_bytes
            )
            if tensors[name].begin + tensors[name].num_bytes > len(self.data):
                raise _truncated(self.path, f"{name} ends at byte {tensors[name].begin + tensors[name].num_bytes}")
        return GgufFile(self.path, metadata, tensors)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, num_dimensions = self.string(), self.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise _corrupt(self.path, f"{name} has {num_dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))[::-1]
        number = self.scalar("I")
        try:
            return name, shape, gguf.GGMLQuantizationType(number), self.scalar("Q")
        except ValueError:
            raise _corrupt(self.path, f"{name} has the unknown type {number}") from None

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.offset + length
        if end > len(self.data):
            raise _truncated(self.path, f"a string ends at byte {end}")
        text = self.data[self.offset : end].decode("utf-8", "surrogateescape")
        self.offset = end
        return text

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _corrupt(self.path, f"unknown metadata type {kind}")
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if item_kind == _STRING:
            return [self.string() for _ in range(count)]  # a wrong count ends with an error where the file does
        if item_kind not in _SCALARS:
            raise _corrupt(self.path, f"unknown array item type {item_kind}")
        code = f"<{_SCALARS[item_kind]}"
        end = self.offset + count * struct.calcsize(code)
        if end > len(self.data):
            raise _truncated(self.path, f"an array ends at byte {end}")
        values = [value for (value,) in struct.iter_unpack(code, self.data[self.offset : end])]
        self.offset = end
        return values


def _corrupt(path: Path, fault: str) -> CheckpointError:
    return CheckpointError("GGUF_CORRUPT", f"{path} is not a valid GGUF file: {fault}; download it again", path=path)


def _truncated(path: Path, fault: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(
        "GGUF_TRUNCATED",
        f"{path} is truncated: it has {size} bytes, {fault}; download it again",
        path=path,
        actual_bytes=size,
    )
