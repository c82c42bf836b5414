"""Typed values out of a parsed `config.json`: each error names the key, its value and what was expected. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stageline.errors import CheckpointError

# The largest sizes that are plausible: beyond them a config.json is damaged, and tables made from it would fill memory.
MAX_LAYERS = 4096
MAX_WIDTH = 1 << 24  # of hidden states, heads, the MLP and the vocabulary
MAX_POSITIONS = (1 << 31) - 1  # positions travel as int32
MAX_ROPE_THETA = 1e15


def invalid(key: str, value: object, expected: str, source: str = "") -> CheckpointError:
    """The error for one key (reason CONFIG_VALUE_NOT_SERVED)."""
    shown = shorten(value)
    prefix = f"{source}: " if source else ""
    return CheckpointError(
        "CONFIG_VALUE_NOT_SERVED",
        f"{prefix}{key} must be {expected}, got {shown}",
        field=key,
        value=shown,
        expected=expected,
        source=source or None,
    )


def shorten(value: object, limit: int = 120) -> str:
    """`repr`, cut where a damaged file would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints; a list nested too deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def check_integer(key: str, value: object, *, low: int = 1, high: int, source: str = "") -> int:
    """An integer in [low, high]. Raises CheckpointError; a bool or a float is none, whatever its value."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise invalid(key, value, f"an integer in [{low}, {high}]", source)
    return value


def check_number(key: str, value: object, *, low: float, high: float, source: str = "") -> float:
    """A finite number in (low, high]. Raises CheckpointError."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high
    if not fits or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise invalid(key, value, f"a number above {low:g} and at most {high:g}", source)
    return float(value)  # type: ignore[arg-type]


class ConfigReader:
    """Reads keys of a JSON object; `source` is named in errors. Every method raises CheckpointError."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self._data, self._source = data, source

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """An integer; the key must be there unless there is a default. null is not an integer."""
        return check_integer(key, self._data.get(key, default), low=low, high=high, source=self._source)

    def optional_integer(self, key: str, *, low: int = 1, high: int) -> int | None:
        """An integer, or None where the key is missing or null."""
        return None if self._data.get(key) is None else self.integer(key, low=low, high=high)

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """A finite number in (low, high]."""
        return check_number(key, self._data.get(key, default), low=low, high=high, source=self._source)

    def flag(self, key: str) -> bool:
        """true or false; false where the key is missing."""
        value = self._data.get(key, False)
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return value

    def optional_object(self, key: str) -> dict[str, Any]:
        """An object; empty where the key is missing or null."""
        value = self._data.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.invalid(key, "an object or null")
        return dict(value or {})

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids, or none (missing or null)."""
        value = self._data.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in values:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self.invalid(key, f"a token id in [0, {vocab_size}), a list of such ids, or null")
        return tuple(values)

    def invalid(self, key: str, expected: str) -> CheckpointError:
        """The error for a key of this file."""
        return invalid(key, self._data.get(key), expected, self._source)
