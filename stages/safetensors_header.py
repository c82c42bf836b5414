"""The header of a safetensors file, read without torch and without touching the tensor data.

Format (https://github.com/huggingface/safetensors#format): eight bytes, little endian, the length N of the header;
N bytes of JSON, tensor name → {"dtype", "shape", "data_offsets": [begin, end)}; the data, without holes, to the end
of the file. Offsets count from the end of the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header; `[begin, end)` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """`tensors` in the order of the file's data; `header_json` is the header's bytes as they are."""

    path: Path
    file_bytes: int
    header_json: bytes
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of one shard.

    Raises CheckpointError: SHARD_MISSING, SHARD_UNREADABLE, SHARD_CORRUPT (the header cannot be understood), or
    SHARD_TRUNCATED (the file's size is not what its header says).
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > file_bytes - 8:
                raise _truncated(path, file_bytes, f"{8 + header_bytes} for its header alone")
            if header_bytes > _MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header claims {header_bytes} bytes, the format allows {_MAX_HEADER_BYTES}")
            header_json = file.read(header_bytes)
    except FileNotFoundError:
        raise CheckpointError(
            "SHARD_MISSING",
            f"shard {path.name} is missing: {path} does not exist; download it again",
            shard=path.name,
            path=path,
        ) from None
    except OSError as error:
        raise CheckpointError(
            "SHARD_UNREADABLE", f"shard {path} cannot be read: {error.strerror}", shard=path.name, path=path
        ) from None
    try:
        entries = json.loads(header_json)
    except ValueError as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _corrupt(path, "its header is not a JSON object")
    data_start = 8 + header_bytes
    infos = {name: _parse(path, name, entry, data_start) for name, entry in entries.items() if name != "__metadata__"}
    tensors = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = data_start
    for name, info in tensors.items():
        if info.begin != position:
            raise _corrupt(path, f"the data of {name} starts at byte {info.begin}, expected {position}", tensor=name)
        position = info.end
    if position != file_bytes:
        raise _truncated(path, file_bytes, str(position))
    return SafetensorsHeader(path, file_bytes, header_json, tensors)


def _parse(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(n, int) and n >= 0 for n in shape
        ):
            bits = _DTYPE_BITS.get(dtype)
            if bits is None:
                raise _corrupt(path, f"{name} has the unknown dtype {dtype!r}", tensor=name, dtype=dtype)
            if (end - begin) * 8 != math.prod(shape) * bits:
                raise _corrupt(
                    path,
                    f"{name} {dtype}{shape} has {end - begin} bytes, expected {math.prod(shape) * bits // 8}",
                    tensor=name,
                )
            return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)
    raise _corrupt(path, f"the entry of {name} is not dtype, shape and data_offsets: {entry!r:.200}", tensor=name)


def _corrupt(path: Path, fault: str, **metadata: object) -> CheckpointError:
    return CheckpointError(
        "SHARD_CORRUPT", f"shard {path} is corrupt: {fault}; download it again", shard=path.name, path=path, **metadata
    )


def _truncated(path: Path, actual: int, expected: str) -> CheckpointError:
    return CheckpointError(
        "SHARD_TRUNCATED",
        f"shard {path} has {actual} bytes, expected {expected}: it is truncated or damaged; download it again",
        shard=path.name,
        path=path,
        actual_bytes=actual,
        expected_bytes=expected,
    )
