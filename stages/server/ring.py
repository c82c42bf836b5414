"""A ring in memory that the two stages of a link share, so that hidden states on one host cross it with a single copy.

The sender makes the memory, offers it in the metadata of its Forward stream, and copies payloads into it; the receiver
computes from where they lie and gives the room back afterwards. Only positions travel in the stream. Neither side
believes that it shares memory until it has seen what the other wrote there: a process id means something else in another
container. No torch here.

The memory is a memfd: it has no name, so whatever dies at whatever moment, the kernel frees it with the last mapping, and
the size of /dev/shm does not matter. It is sealed against shrinking, so that no peer can make the other's reads fault.
It takes memory as it is used, page by page (huge ones where the system has them). A ring belongs to one stream, thus to
one epoch: an owner that was fenced writes into memory that nobody reads any more.

    offset 0     16 bytes  the sender's token
    offset 16    16 bytes  the receiver's token
    offset 64    uint64    position up to which the receiver is done; it alone writes this
    offset 4096  the ring; position p, which only grows, lies at p modulo its size
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import mmap
import os
import re
import secrets
import stat
import threading
from typing import Any

import numpy as np

from stageline.errors import InvalidArgumentError

_LOG = logging.getLogger(__name__)

MAX_RING_BYTES = 1 << 40
OFFER, PROOF = "stageline-ring", "stageline-ring-proof"  # metadata keys

_NAME = "stageline-ring"
_DATA_OFFSET, _DONE_OFFSET, _TOKEN_BYTES, _ALIGNMENT = 4096, 64, 16, 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_OFFER_FORMAT = re.compile(r"([1-9][0-9]{0,9})/([0-9]{1,9})/([1-9][0-9]{0,12})", re.ASCII)


class SendRing:
    """The sender's end."""

    def __init__(self, size_bytes: int) -> None:
        """Raises OSError where the system does not give such memory (another system than Linux, no room to map)."""
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        self.size_bytes = _round_up(size_bytes, mmap.PAGESIZE)
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, _DATA_OFFSET + self.size_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map: Any = _mapped(self._fd, _DATA_OFFSET + self.size_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._token = self._map[:_TOKEN_BYTES] = secrets.token_bytes(_TOKEN_BYTES)
        self._data: Any = np.frombuffer(self._map, np.uint8, offset=_DATA_OFFSET)
        self._done_1: Any = np.frombuffer(self._map, np.uint64, count=1, offset=_DONE_OFFSET)
        self._head = self._seen = 0
        self._usable = True

    def offer(self) -> str:
        """For the stream's metadata, under OFFER."""
        return f"{os.getpid()}/{self._fd}/{self.size_bytes}"

    def settle(self, proof: str | bytes) -> bool:
        """Whether the receiver's PROOF shows that it reads and writes this memory. What was offered is not there any more."""
        os.close(self._fd)
        self._fd = -1
        theirs = self._map[_TOKEN_BYTES : 2 * _TOKEN_BYTES]
        given = proof.encode() if isinstance(proof, str) else proof
        return hmac.compare_digest(given, (self._token + theirs).hex().encode()) and any(theirs)

    def close(self) -> None:
        """No more room is given. The memory is unmapped at once, or after a copy that runs."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._usable = False
        self._data = self._done_1 = self._map = None

    def reserve(self, num_bytes: int) -> int | None:
        """A position with room for `num_bytes`, or None while there is none: such a payload goes in frames."""
        if not self._usable:
            return None
        done, size = int(self._done_1[0]), self.size_bytes
        if not self._seen <= done <= self._head:
            self._usable = False
            _LOG.warning("shared memory is not used any more: the receiver is done up to %d of %d", done, self._head)
            return None
        self._seen, need, start, empty = done, _round_up(num_bytes, _ALIGNMENT), self._head, done == self._head
        if empty or start % size + need > size:  # the beginning is in caches; or there is no room up to the end
            start = _round_up(start, size)
        if start + need - (start if empty else done) > size:
            return None
        self._head = start + need
        return start

    def fill(self, position: int, payload: Any) -> None:
        """Copy a payload (bytes-like) to a position that was reserved for it."""
        source, data = np.frombuffer(payload, np.uint8), self._data
        if data is not None:  # else closed meanwhile: what is sent afterwards reaches nobody
            offset = position % self.size_bytes
            np.copyto(data[offset : offset + len(source)], source)


class ReceiveRing:
    """The receiver's end. `take` on the event loop, `give_back` on the compute thread, both in the order of steps."""

    def __init__(self, offer: str) -> None:
        """Open what a sender offers. Raises OSError or ValueError where that is no ring, or not to be had from here."""
        match = _OFFER_FORMAT.fullmatch(offer)
        if match is None:
            raise ValueError(f"not an offer: {offer!r:.60}")
        pid, fd, size = map(int, match.groups())
        path = f"/proc/{pid}/fd/{fd}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):  # opening some other thing might do something to it
            raise ValueError(f"{path} is not a ring")
        own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(own)
            if not stat.S_ISREG(found.st_mode) or found.st_size != _DATA_OFFSET + size or size > MAX_RING_BYTES:
                raise ValueError(f"{path} has {found.st_size} bytes, expected {_DATA_OFFSET + size}")
            if fcntl.fcntl(own, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ValueError(f"{path} is not sealed")
            self._map: Any = _mapped(own, _DATA_OFFSET + size)
        finally:
            os.close(own)
        self.size_bytes = size
        token = secrets.token_bytes(_TOKEN_BYTES)
        self.proof = (self._map[:_TOKEN_BYTES] + token).hex()
        self._map[_TOKEN_BYTES : 2 * _TOKEN_BYTES] = token
        self._done_1: Any = np.frombuffer(self._map, np.uint64, count=1, offset=_DONE_OFFSET)
        self._taken = self._given_back = 0
        self._order = threading.Lock()

    def take(self, position: int, num_bytes: int) -> memoryview:
        """The payload at a position; nobody writes there until `give_back`.

        Raises InvalidArgumentError (reason MALFORMED_FRAME) for a place that a sender cannot have reserved, such as one
        that was taken before.
        """
        offset, end = position % self.size_bytes, position + _round_up(num_bytes, _ALIGNMENT)
        first = position if self._given_back == self._taken else self._given_back  # that is not free
        if (
            num_bytes <= 0 or position % _ALIGNMENT or not self._taken <= position < 1 << 63
            or offset + num_bytes > self.size_bytes or end - first > self.size_bytes
        ):  # fmt: skip
            raise InvalidArgumentError(
                "MALFORMED_FRAME",
                f"malformed frame: {num_bytes} bytes at {position} cannot lie in a ring of {self.size_bytes} bytes of which "
                f"[{self._given_back}, {self._taken}) is taken",
            )
        self._taken = end
        return memoryview(self._map)[_DATA_OFFSET + offset : _DATA_OFFSET + offset + num_bytes]

    def give_back(self, position: int, num_bytes: int) -> None:
        """The payload, and every one before it, is not read any more."""
        end = position + _round_up(num_bytes, _ALIGNMENT)
        for _ in range(2):  # what was read before the first release is read before anything after the second acquire
            with self._order:
                pass
        self._given_back, done_1 = end, self._done_1
        if done_1 is not None:
            done_1[0] = end

    def close(self) -> None:
        """Nothing is taken any more. The memory is unmapped once the payloads that were taken are gone."""
        self._done_1 = self._map = None


def offered(size_bytes: int) -> SendRing | None:
    """A ring to offer, None where `size_bytes` is 0 or the system gives none, which is logged."""
    if not size_bytes:
        return None
    try:
        return SendRing(size_bytes)
    except (OSError, ValueError, OverflowError) as error:
        _LOG.warning("shared memory of %d bytes is not to be had, payloads go in frames: %s", size_bytes, error)
        return None


def attached(offer: str) -> ReceiveRing | None:
    """The ring that a sender offers, None where it is not to be had from here, which is logged."""
    try:
        return ReceiveRing(offer)
    except (OSError, ValueError, OverflowError) as error:
        _LOG.info("no shared memory with the sender, payloads come in frames: %s", error)
        return None


def _mapped(fd: int, num_bytes: int) -> mmap.mmap:
    """Shared memory, in huge pages where the system has them: with small ones the copy waits for address translation."""
    memory = mmap.mmap(fd, num_bytes)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
