"""What is known of a batch before anything runs: how many lines, which cannot run, whether it is refused. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.batch.lines import ENDPOINTS, LineProblem, is_blank, read_line
from gateway.batch.records import line_record
from stageline.errors import InvalidArgumentError

MAX_NAMED_DUPLICATES = 10
MAX_WINDOW_HOURS = 8760
MAX_METADATA = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """`endpoint`: as given, else that of the first line that can run. `problems`: (line from 1, its error record)."""

    endpoint: str
    total: int
    problems: tuple[tuple[int, bytes], ...]


def make_plan(batch_id: str, lines: Iterable[tuple[int, bytes]], endpoint: str, max_lines: int) -> Plan:
    """Read every (number, line) once. `endpoint` "": each line's own.

    Raises InvalidArgumentError for an input without requests, one with more than `max_lines`, and for custom_ids that
    occur twice, with the lines.
    """
    total, problems = 0, []
    first_lines: dict[str, int] = {}
    duplicates: list[tuple[str, int, int]] = []
    shown = endpoint
    for number, line in lines:
        if is_blank(line):
            continue
        total += 1
        read = read_line(line, number, endpoint)
        if isinstance(read, LineProblem):
            problems.append((number, line_record(batch_id, number, read.custom_id, error=read.error)))
        else:
            shown = shown or read.url
        if read.custom_id is not None:
            first = first_lines.setdefault(read.custom_id, number)
            if first != number:
                duplicates.append((read.custom_id, first, number))
    if not total:
        raise InvalidArgumentError("INPUT_EMPTY", "the input holds no request; expected one a line", field="input")
    if total > max_lines:
        raise InvalidArgumentError(
            "INPUT_TOO_MANY_LINES", f"the input holds {total} requests, at most {max_lines} are taken; cut it in pieces",
            field="input", count=total, limit=max_lines,
        )  # fmt: skip
    if duplicates:
        named_first = duplicates[:MAX_NAMED_DUPLICATES]
        named = "; ".join(f"{name[:64]!r} in lines {first} and {again}" for name, first, again in named_first)
        more = len(duplicates) - MAX_NAMED_DUPLICATES
        raise InvalidArgumentError(
            "CUSTOM_ID_DUPLICATE",
            f"every custom_id may occur once: {named}{f' and {more} more' if more > 0 else ''}",
            field="custom_id", count=len(duplicates), lines=",".join(str(again) for *_, again in named_first),
        )  # fmt: skip
    return Plan(shown or ENDPOINTS[0], total, tuple(problems))


def check_endpoint(endpoint: str) -> str:
    """The endpoint, unchanged. Raises InvalidArgumentError for one that batches cannot have."""
    if endpoint not in ENDPOINTS:
        raise InvalidArgumentError(
            "ENDPOINT_UNKNOWN", f"endpoint must be one of {', '.join(ENDPOINTS)}, got {endpoint[:64]!r}",
            field="endpoint", value=endpoint[:64],
        )  # fmt: skip
    return endpoint


def window_s(text: str) -> int:
    """Seconds of a completion window such as "24h". Raises InvalidArgumentError for anything but 1h to 8760h."""
    hours = text.removesuffix("h")
    if text.endswith("h") and hours.isascii() and hours.isdigit() and 1 <= int(hours[:8]) <= MAX_WINDOW_HOURS:
        return int(hours) * 3600
    raise InvalidArgumentError(
        "COMPLETION_WINDOW_INVALID", f'completion_window must be hours from "1h" to "8760h", got {text[:32]!r}',
        field="completion_window", value=text[:32],
    )  # fmt: skip


def check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata, unchanged. Raises InvalidArgumentError beyond OpenAI's bounds: 16 pairs, keys of 64, values of 512."""
    if len(metadata) > MAX_METADATA or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
        raise InvalidArgumentError(
            "METADATA_TOO_LARGE", "metadata may hold 16 pairs, with keys of 64 and values of 512 characters",
            field="metadata", count=len(metadata),
        )  # fmt: skip
    return metadata
