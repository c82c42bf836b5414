"""Random numbers as a pure function of (seed, choice, position, stream): Philox4x32-10 (Salmon et al., SC'11). No torch.

A sequence resumed anywhere, by any gateway, draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

STREAM_CHOICE = 0  # the gateway's choice among the candidates
STREAM_TAIL = 1  # the last stage's draw beyond them


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key (section 3.3 of the paper)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int, stream: int) -> float:
    """A float in [0, 1) with 53 random bits. `seed` is an unsigned 64-bit number, the others unsigned 32-bit."""
    words = philox4x32((position & _MASK, choice & _MASK, stream, 0), (seed & _MASK, (seed >> 32) & _MASK))
    return (((words[0] << 32) | words[1]) >> 11) * 2.0**-53


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int], stream: int
) -> NDArray[np.float64]:
    """`uniform` of many rows at once, float64 [N]."""
    mask, shift = np.uint64(_MASK), np.uint64(32)
    c0 = np.array(positions, dtype=np.uint64) & mask
    c1 = np.array(choices, dtype=np.uint64) & mask
    c2, c3 = np.full_like(c0, stream), np.zeros_like(c0)
    key = np.array(seeds, dtype=np.uint64)
    k0, k1 = key & mask, key >> shift
    for _ in range(10):
        p0, p1 = np.uint64(_M0) * c0, np.uint64(_M1) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & mask, (p0 >> shift) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + np.uint64(_W0)) & mask, (k1 + np.uint64(_W1)) & mask
    return np.asarray((((c0 << shift) | c1) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
