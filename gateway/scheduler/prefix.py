"""Keys of KV blocks by content: two blocks with the same key hold the keys and values of the same tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

KEY_BYTES = 32
"""A collision would show one client the context of another, so no cheap hash: blake2b, 128 bits against collisions."""


def root_key(tenant: str, salt: str) -> bytes:
    """The key before the first block. Blocks are shared only between sequences of one tenant and one salt."""
    name = tenant.encode()
    return blake2b(len(name).to_bytes(8, "little") + name + salt.encode(), digest_size=KEY_BYTES).digest()


def next_key(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """The key of a full block: of everything before it (`parent`) and of its own tokens."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=KEY_BYTES).digest()
