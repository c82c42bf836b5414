"""Philox4x32-10 against the known answers published with Random123 (kat_vectors)."""

import pytest

from stages.rng import STREAM_CHOICE, STREAM_TAIL, philox4x32, uniform, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected


def test_every_argument_changes_the_number():
    numbers = {uniform(*args) for args in [(1, 2, 3, 0), (1 << 40, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]}
    assert len(numbers) == 5
    assert all(0 <= number < 1 for number in numbers)


def test_many_rows_at_once_are_the_same_numbers():
    seeds, choices, positions = [0, 1, 2**53 - 1, 2**64 - 1, 7], [0, 3, 127, 2**32 - 1, 1], [0, 1, 40_000, 2**32 - 1, 9]
    for stream in (STREAM_CHOICE, STREAM_TAIL):
        expected = [uniform(*args, stream) for args in zip(seeds, choices, positions, strict=True)]
        assert uniforms(seeds, choices, positions, stream).tolist() == expected
