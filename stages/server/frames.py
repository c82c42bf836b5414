"""Frames of the data streams. No torch here.

A step is one STEP frame (preamble, header, trace) and, between stages, DATA frames with its hidden states:

    preamble  struct <HBBBxxxQQIIQ>: magic, version, kind, element type, epoch, step id, header bytes, trace bytes, payload bytes
    header    the serialized Step, forwarded byte for byte; a serialized StepError in a FAILED frame
    trace     a serialized StepResult that holds the timings of the stages passed so far
    payload   ceil(payload bytes / MAX_DATA_BYTES) DATA frames of raw little-endian elements, in order

A DATA frame is a preamble with header, trace and payload sizes (0, 0, bytes in this frame), then the bytes. Where the
payload lies in memory that both stages share (stages/server/ring.py), a SHARED frame takes the place of the STEP frame and
its DATA frames: after the trace it has the position in the ring, a uint64. A step that failed travels on as a FAILED frame
without payload, so that answers keep the order of steps.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from stageline.errors import InvalidArgumentError
from stages.server.ring import ReceiveRing

MAX_DATA_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 30  # 65,536 tokens of the 72B in bfloat16
MAX_FRAME_BYTES = MAX_HEADER_BYTES + (1 << 20)

_PREAMBLE = struct.Struct("<HBBB3xQQIIQ")
_POSITION = struct.Struct("<Q")
_MAGIC, _VERSION = 0x4C53, 1


class Kind(enum.IntEnum):
    """What follows a preamble."""

    STEP = 1
    DATA = 2
    FAILED = 3
    SHARED = 4


@dataclass(frozen=True, slots=True)
class StepFrame:
    """One step on the wire. `header` is a Step, or a StepError where `failed`; `payload` the hidden states, if any.

    `give_back`, where set, is to be called once the payload is not read any more: it lies in memory that is used again.
    """

    epoch: int
    step_id: int
    header: bytes
    trace: bytes = b""
    element_type: int = 0
    payload: bytes | bytearray | memoryview = b""
    failed: bool = False
    give_back: Callable[[], None] | None = None


def encode(frame: StepFrame) -> Iterator[bytes]:
    """The gRPC messages of one step."""
    payload = memoryview(frame.payload).cast("B")
    yield _head(frame, Kind.FAILED if frame.failed else Kind.STEP, len(payload))
    for start in range(0, len(payload), MAX_DATA_BYTES):
        part = payload[start : start + MAX_DATA_BYTES]
        preamble = _PREAMBLE.pack(
            _MAGIC, _VERSION, Kind.DATA, frame.element_type, frame.epoch, frame.step_id, 0, 0, len(part)
        )
        yield b"".join((preamble, part))


def encode_shared(frame: StepFrame, position: int) -> bytes:
    """The one gRPC message of a step whose payload lies at `position` of the stream's ring."""
    return _head(frame, Kind.SHARED, len(frame.payload)) + _POSITION.pack(position)


def _head(frame: StepFrame, kind: Kind, payload_bytes: int) -> bytes:
    preamble = _PREAMBLE.pack(
        _MAGIC, _VERSION, kind, frame.element_type, frame.epoch, frame.step_id,
        len(frame.header), len(frame.trace), payload_bytes,
    )  # fmt: skip
    return b"".join((preamble, frame.header, frame.trace))


class Assembler:
    """Puts the messages of a stream together again; `feed` returns a step when its last byte is there."""

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES, ring: ReceiveRing | None = None) -> None:
        """`ring` is the memory that the sender of this stream and we share, if any."""
        self._max_payload_bytes, self._ring = max_payload_bytes, ring
        self._open: StepFrame | None = None
        self._buffer = memoryview(b"")
        self._filled = 0

    def feed(self, message: bytes) -> StepFrame | None:
        """Raises InvalidArgumentError (reason MALFORMED_FRAME) for anything but the next frame of a well-formed stream."""
        if len(message) < _PREAMBLE.size:
            raise _bad(f"{len(message)} bytes are less than a preamble")
        magic, version, kind, element_type, epoch, step_id, header, trace, payload = _PREAMBLE.unpack_from(message)
        if magic != _MAGIC or version != _VERSION:
            raise _bad(f"magic {magic:#x} version {version}, expected {_MAGIC:#x} version {_VERSION}")
        body = memoryview(message)[_PREAMBLE.size :]
        if kind == Kind.DATA:
            return self._data(body, epoch, step_id, header, trace, payload)
        if kind not in (Kind.STEP, Kind.FAILED, Kind.SHARED):
            raise _bad(f"unknown kind {kind}")
        if self._open is not None:
            raise _bad(f"step {step_id} begins before the payload of step {self._open.step_id} is complete")
        if payload > self._max_payload_bytes:
            raise _bad(f"a payload of {payload} bytes, at most {self._max_payload_bytes} can come here")
        place = _POSITION.size if kind == Kind.SHARED else 0
        if header > MAX_HEADER_BYTES or header + trace + place != len(body):
            raise _bad(f"sizes {header} + {trace} do not match a body of {len(body)} bytes")
        if kind == Kind.FAILED and payload:
            raise _bad("a failed step has no payload")
        frame = StepFrame(
            epoch, step_id, bytes(body[:header]), bytes(body[header : header + trace]), element_type, b"",
            kind == Kind.FAILED,
        )  # fmt: skip
        if kind == Kind.SHARED:
            return self._shared(frame, _POSITION.unpack(body[header + trace :])[0], payload)
        if not payload:
            return frame
        # Not bytearray: that writes zeros, so a promise alone would take the memory, and a kept one would write it twice.
        self._open, self._buffer, self._filled = frame, memoryview(np.empty(payload, np.uint8)), 0  # type: ignore[arg-type]
        return None

    def _shared(self, frame: StepFrame, position: int, size: int) -> StepFrame:
        ring = self._ring
        if ring is None:
            raise _bad("a payload in shared memory, but none is shared on this stream")
        payload = ring.take(position, size)
        return replace(frame, payload=payload, give_back=lambda: ring.give_back(position, size))

    def _data(self, body: memoryview, epoch: int, step_id: int, header: int, trace: int, size: int) -> StepFrame | None:
        frame = self._open
        if frame is None or (frame.epoch, frame.step_id) != (epoch, step_id):
            raise _bad(f"data of step {step_id} in epoch {epoch} without its step frame")
        if header or trace or size != len(body) or not size or self._filled + size > len(self._buffer):
            raise _bad(f"{len(body)} bytes of data do not fit into what is left of the payload")
        self._buffer[self._filled : self._filled + size] = body
        self._filled += size
        if self._filled < len(self._buffer):
            return None
        self._open = None
        return replace(frame, payload=self._buffer)


def _bad(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("MALFORMED_FRAME", f"malformed frame: {message}")
