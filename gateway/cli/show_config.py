"""Print the configuration that the same flags, environment and file would give `serve`."""

from __future__ import annotations

import argparse
import json

import yaml

from gateway.cli.options import add_config_arguments, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline config`."""
    add_config_arguments(parser)
    parser.add_argument("--output", choices=["yaml", "json"], default="yaml")


def run(args: argparse.Namespace) -> int:
    """Print every field with its value."""
    data = config_from(args).shown()
    print(json.dumps(data, indent=2) if args.output == "json" else yaml.safe_dump(data, sort_keys=False), end="")
    return 0
