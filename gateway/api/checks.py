"""Checks of single values. Every error names the field as the client wrote it, the value, and what was expected."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from typing import Any, NoReturn

from gateway.api.raw import RawRequest
from gateway.types import to_float32
from stageline.errors import InvalidArgumentError


def check_token_ids(token_ids: Iterable[int], vocab_size: int, field: str) -> None:
    """Raises InvalidArgumentError for the first id outside [0, vocab_size)."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidArgumentError(
                "TOKEN_ID_OUT_OF_RANGE", f"{field}[{index}] is {token_id}; token ids are in [0, {vocab_size})",
                field=f"{field}[{index}]", value=token_id, vocab_size=vocab_size,
            )  # fmt: skip


def real(
    raw: RawRequest, field: str, value: float | None, default: Any, fallback: float, *,
    low: float = 0.0, high: float = math.inf, above_low: bool = False,
) -> float:  # fmt: skip
    """A float32 in [low, high], or in (low, high] with `above_low`; `default` is generation_config.json's.

    Checked as float32, as the last stage will see it: 1e-50 is 0 there, and 1e39 infinite.
    """
    given = value is not None
    asked = float(value if value is not None else fallback if default is None else default)
    number = to_float32(asked)
    if not math.isfinite(number) or number > high or number < low or (above_low and number == low):
        expected = f"in {'(' if above_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        source = "" if given else " (from the model's generation_config.json; set the field)"
        fail(raw, field, _reason(field), f"must be {expected}, got {asked:g}{source}", value=asked, expected=expected)
    return number


def whole(raw: RawRequest, field: str, value: int | None, default: Any, *, low: int = 0, high: int) -> int:
    """An integer in [low, high]. Only a seed has neither value nor default: it is drawn."""
    if value is None and default is None:
        return draw_seed()
    number = int(default if value is None else value)
    if not low <= number <= high:
        expected = f"in [{low}, {high}]"
        fail(raw, field, _reason(field), f"must be {expected}, got {number}", value=number, expected=expected)
    return number


def draw_seed() -> int:
    """A seed for who gave none: 53 bits, which every JSON client reads back exactly."""
    return secrets.randbits(53)


def count_at_most(raw: RawRequest, field: str, count: int, limit: int) -> None:
    """Raise InvalidArgumentError for more than `limit` entries."""
    if count > limit:
        fail(
            raw,
            field,
            f"{field.upper()}_TOO_MANY",
            f"has {count} entries, the limit is {limit}",
            count=count,
            limit=limit,
        )


def _reason(field: str) -> str:
    return f"{field.replace('.', '_').upper()}_OUT_OF_RANGE"


def shown_name(raw: RawRequest, field: str) -> str:
    """The field as this door's clients write it."""
    return raw.names.get(field, field)


def fail(raw: RawRequest, field: str, reason: str, problem: str, **metadata: object) -> NoReturn:
    """Raise InvalidArgumentError: the field's name, then `problem`."""
    shown = shown_name(raw, field)
    raise InvalidArgumentError(reason, f"{shown} {problem}", field=shown, **metadata)
