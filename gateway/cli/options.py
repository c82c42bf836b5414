"""Configuration fields as command line flags."""

from __future__ import annotations

import argparse
import os
from typing import Any

from gateway.config import SHORT_NAMES, Config, fields, load


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config, the short flags and one flag a field."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with sections of fields")
    short = {field: flag.replace("_", "-") for flag, field in SHORT_NAMES.items()}
    for section, name, kind, description in fields():
        field = f"{section}.{name}"
        long = "--" + field.replace("_", "-")
        flags = [f"--{short[field]}", long] if field in short else [long]
        constant: Any = {"nargs": "?", "const": "true"} if kind is bool else {}
        parser.add_argument(*flags, dest=field, metavar=name.upper(), help=description.replace("%", "%%"), **constant)


def config_from(args: argparse.Namespace) -> Config:
    """Merge flags over environment over file over defaults."""
    given = {f"{section}.{name}" for section, name, *_ in fields()}
    flags = {key: value for key, value in vars(args).items() if key in given and value is not None}
    return load(args.config, flags, os.environ)
