"""Lines of an input file: cut from chunks of bytes, and read as requests. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stageline.errors import InvalidArgumentError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
MAX_LINE_BYTES = 16 * 2**20  # as a body at the HTTP door
MAX_CUSTOM_ID_CHARS = 512
_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A line that can be run: `body` is still unchecked."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LineProblem:
    """A line that cannot; `custom_id` is None where it has none that can be used."""

    custom_id: str | None
    error: InvalidArgumentError


class LineSplitter:
    """Cuts chunks of bytes into lines, each with its own line feed; only the last one may lack it."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._num_lines = 0

    def add(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes. Raises InvalidArgumentError that names a line over MAX_LINE_BYTES."""
        self._rest += chunk
        end = self._rest.rfind(b"\n") + 1
        lines = _cut(bytes(self._rest[:end]))
        del self._rest[:end]
        for line in [*lines, self._rest]:
            self._num_lines += 1
            if len(line) > MAX_LINE_BYTES:
                raise InvalidArgumentError(
                    "LINE_TOO_LONG", f"line {self._num_lines} has over {MAX_LINE_BYTES} bytes; shorten its body",
                    field="input", line=self._num_lines, limit=MAX_LINE_BYTES,
                )  # fmt: skip
        self._num_lines -= 1  # the rest is no line yet
        return lines

    def end(self) -> list[bytes]:
        """The last line, where the file does not end with a line feed."""
        return [bytes(self._rest)] if self._rest else []


def _cut(data: bytes) -> list[bytes]:
    # bytes.splitlines also cuts at carriage returns, which JSON lines may hold as white space.
    return [piece + b"\n" for piece in data.split(b"\n")[:-1]]


def is_blank(line: bytes) -> bool:
    """Whether there is nothing to run; such lines are passed over."""
    return not line.strip()


def read_line(line: bytes, number: int, endpoint: str) -> LineRequest | LineProblem:
    """The request of one line. `number` counts from 1; an `endpoint` that is not empty is the only one taken."""
    try:
        data = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        return _problem(None, number, "LINE_NOT_UTF8", "is not UTF-8")
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "a value that is not JSON, or nested too deep"
        return _problem(None, number, "LINE_NOT_JSON", f"is not JSON: {why}")
    if not isinstance(data, dict):
        return _problem(None, number, "LINE_NOT_OBJECT", "must be a JSON object with custom_id, method, url and body")
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS or not _is_unicode(custom_id):
        text = f"needs a custom_id: text of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        return _problem(None, number, "CUSTOM_ID_INVALID", text, "custom_id")
    for problem in _problems(data, endpoint):
        return _problem(custom_id, number, *problem)
    return LineRequest(custom_id, data["url"], data["body"])


def _problems(data: dict[str, Any], endpoint: str) -> Iterator[tuple[str, str, str]]:
    for name in sorted(_FIELDS - data.keys()):
        yield "FIELD_MISSING", f"lacks the field {name}", name
    for name in sorted(data.keys() - _FIELDS):
        yield "FIELD_UNKNOWN", f"has an unknown field {name[:64]!r}; leave it out", name[:64]
    if data["method"] != "POST":
        yield "METHOD_WRONG", f'must have method "POST", has {str(data["method"])[:32]!r}', "method"
    url = data["url"]
    if url not in ENDPOINTS:
        yield "URL_UNKNOWN", f"must have one of the urls {', '.join(ENDPOINTS)}, has {str(url)[:64]!r}", "url"
    if endpoint and url != endpoint:
        yield "URL_MISMATCH", f"must have the batch's url {endpoint}, has {url}", "url"
    if not isinstance(data["body"], dict):
        yield "BODY_INVALID", "must have a body that is a JSON object", "body"


def _problem(custom_id: str | None, number: int, reason: str, text: str, field: str | None = None) -> LineProblem:
    return LineProblem(custom_id, InvalidArgumentError(reason, f"line {number} {text}", line=number, field=field))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
