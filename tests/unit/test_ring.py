"""The ring two stages share: what was put in comes out, room is never given twice, and no peer is believed unseen."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageline.errors import InvalidArgumentError
from stages.server.frames import Assembler, StepFrame, encode, encode_shared
from stages.server.ring import ReceiveRing, SendRing, attached, offered

SIZE = 64 << 10


def pair(size: int = SIZE) -> tuple[SendRing, ReceiveRing]:
    sender = SendRing(size)
    receiver = ReceiveRing(sender.offer())
    assert sender.settle(receiver.proof)
    return sender, receiver


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.integers(1, SIZE // 2), st.integers(1, 200), st.integers(SIZE - 100, SIZE + 100), st.none()))
)
def test_payloads_come_out_as_they_went_in_however_they_are_mixed(actions: list[int | None]) -> None:
    """A number puts a payload of that size in, None gives the oldest back; what is held must never change meanwhile."""
    sender, receiver = pair()
    held: deque[tuple[int, memoryview, bytes]] = deque()
    rng = np.random.default_rng(len(actions))
    for action in actions:
        if action is None:
            if held:
                position, view, _ = held.popleft()
                receiver.give_back(position, len(view))
            continue
        position = sender.reserve(action)
        if position is None:
            assert action > SIZE or held, "an empty ring has room for everything that is not larger than it"
            continue
        payload = rng.bytes(action)
        sender.fill(position, payload)
        held.append((position, receiver.take(position, action), payload))
        assert all(bytes(view) == expected for _, view, expected in held)
    while held:
        position, view, _ = held.popleft()
        receiver.give_back(position, len(view))
    assert sender.reserve(SIZE) is not None


def test_a_position_is_taken_once_and_only_where_a_sender_can_have_put_something() -> None:
    sender, receiver = pair()
    position = sender.reserve(1000)
    assert position is not None
    receiver.take(position, 1000)
    for place, size in [
        (position, 1000),  # a second time
        (position + 8, 8),  # within what is taken, and not aligned
        (1024, 0),
        (1024, SIZE),  # past the end
        (SIZE - 64, 65),
        (SIZE, SIZE),  # over what is not given back
        (1 << 63, 64),
        ((1 << 64) - 64, 64),
    ]:
        with pytest.raises(InvalidArgumentError, match="cannot lie in a ring"):
            receiver.take(place, size)
    receiver.give_back(position, 1000)
    with pytest.raises(InvalidArgumentError, match="cannot lie in a ring"):
        receiver.take(position, 1000)  # a stale one: its room may be in use again
    assert len(receiver.take(1024, 64)) == 64


@pytest.mark.parametrize("done", [(1 << 64) - 1, 4096])
def test_a_receiver_that_claims_more_than_it_got_is_not_sent_to_any_more(done: int) -> None:
    sender, receiver = pair()
    assert sender.reserve(100) is not None
    receiver._done_1[0] = done
    assert sender.reserve(100) is None
    receiver._done_1[0] = 128
    assert sender.reserve(100) is None


def test_only_a_receiver_that_saw_and_wrote_the_memory_is_believed() -> None:
    sender, other = SendRing(SIZE), SendRing(SIZE)
    elsewhere = ReceiveRing(other.offer())
    assert not sender.settle(elsewhere.proof)
    sender = SendRing(SIZE)
    token = bytes(sender._map[:16])
    assert not sender.settle((token + bytes(16)).hex())  # has read, but not written
    assert not SendRing(SIZE).settle("")
    assert not SendRing(SIZE).settle("ä")


def test_offers_that_name_no_ring_are_declined(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE + 4096))
    plain = os.open(path, os.O_RDWR)
    unsealed = os.memfd_create("stageline-ring")
    os.ftruncate(unsealed, SIZE + 4096)
    sender = SendRing(SIZE)
    try:
        pid, fd, size = sender.offer().split("/")
        for offer in (
            "", "1", "a/b/c", "../1/2", f"{pid}/{fd}/{size}/", f"{pid}/{fd}/٣", f"{pid}/{fd}/{int(size) * 2}",
            f"{pid}/{fd}/999999999999", f"{pid}/{plain}/{SIZE}", f"{pid}/{unsealed}/{SIZE}", f"{pid}/999999/{size}",
            f"4194305/{fd}/{size}",
        ):  # fmt: skip
            assert attached(offer) is None, offer
        assert attached(sender.offer()) is not None
    finally:
        os.close(plain)
        os.close(unsealed)
        sender.close()


def test_the_memory_cannot_be_cut_off_under_a_reader() -> None:
    sender = SendRing(SIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(sender._fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(sender._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    sender.close()


def test_nothing_is_left_open_and_nothing_in_the_file_system() -> None:
    gc.collect()
    files, mapped, opened = os.listdir("/dev/shm"), mappings(), descriptors()
    sender, receiver = pair()
    assert descriptors() == opened + 2  # mmap keeps one for each mapping
    assert os.listdir("/dev/shm") == files
    assert mappings() == mapped + 2
    view = receiver.take(sender.reserve(64) or 0, 64)
    del sender, receiver
    assert mappings() == mapped + 1
    view[:2] = b"ok"  # still there while it is looked at
    del view
    assert (mappings(), descriptors()) == (mapped, opened)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("stageline-ring")


def descriptors() -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the folder
            count += "stageline-ring" in os.readlink(f"/proc/self/fd/{fd}")
    return count


def test_a_system_that_gives_less_memory_than_asked_leaves_us_with_frames() -> None:
    """A process that may not make files of this size: the same error as a full memory file system."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from stages.server.ring import offered; print(offered(2 << 20) is None, offered(1 << 19) is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert "payloads go in frames" in done.stderr
    assert offered(0) is None


def test_shared_frames_among_others_keep_the_order_and_the_bytes() -> None:
    sender, receiver = pair()
    assembler, got = Assembler(ring=receiver), []
    for number in range(20):
        frame = StepFrame(1, number, b"header", b"trace", 1, bytes([number]) * (number + 1))
        position = sender.reserve(len(frame.payload)) if number % 3 else None
        if position is None:
            answers = [assembler.feed(message) for message in encode(frame)]
        else:
            sender.fill(position, frame.payload)
            answers = [assembler.feed(encode_shared(frame, position))]
        assert answers[-1] is not None
        got.append(answers[-1])
        assert (answers[-1].give_back is not None) == bool(number % 3)
    for number, frame in enumerate(got):
        expected = (number, b"header", b"trace", 1, bytes([number]) * (number + 1))
        assert (frame.step_id, frame.header, frame.trace, frame.element_type, bytes(frame.payload)) == expected
        if frame.give_back is not None:
            frame.give_back()
    assert sender.reserve(SIZE) is not None


def test_a_shared_frame_is_refused_without_a_ring_and_when_too_large_or_cut() -> None:
    sender, receiver = pair()
    message = encode_shared(StepFrame(1, 1, b"h", payload=b"x" * 100), sender.reserve(100) or 0)
    for assembler, damaged in (
        (Assembler(), message),
        (Assembler(99, receiver), message),
        (Assembler(ring=receiver), message[:-1]),
        (Assembler(ring=receiver), message + b"x"),
        (Assembler(ring=receiver), encode_shared(StepFrame(1, 1, b"h"), 0)),
    ):
        with pytest.raises(InvalidArgumentError, match="malformed frame"):
            assembler.feed(damaged)
