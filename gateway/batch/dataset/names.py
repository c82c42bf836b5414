"""The three files of a job, by path or URL. Pure."""

from __future__ import annotations

from pathlib import Path

from stageline.errors import ConfigError

SUFFIXES = (".jsonl", ".parquet")


def absolute(url: str) -> str:
    """The same place, named alike from every working directory."""
    return url if "://" in url else str(Path(url).absolute())


def error_file(output: str) -> str:
    """Where errors go unless told otherwise."""
    for suffix in SUFFIXES:
        output = output.removesuffix(suffix)
    return f"{output}.errors.jsonl"


def check_files(given: str, output: str, errors: str) -> None:
    """Raises ConfigError where the three are not three files of known kinds."""
    if not output.endswith(SUFFIXES):
        raise ConfigError(
            "OUTPUT_SUFFIX_UNKNOWN", f"--output-file {output}: expected a name that ends with .jsonl or .parquet",
            field="--output-file",
        )  # fmt: skip
    if not errors.endswith(".jsonl"):
        raise ConfigError(
            "OUTPUT_SUFFIX_UNKNOWN",
            f"--error-file {errors}: expected a name that ends with .jsonl",
            field="--error-file",
        )
    if len({absolute(url) for url in (given, output, errors)}) < 3:
        raise ConfigError("OUTPUT_IS_INPUT", "input, --output-file and --error-file must be three files")
