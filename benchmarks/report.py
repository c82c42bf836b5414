"""What benchmarks have in common: their options, and what every figure needs beside it."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--model` and `--stages`, for `about`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--stages", type=int, default=1)
    return parser


def about(what: str, args: argparse.Namespace) -> dict[str, object]:
    """The beginning of a report: what was measured, of which model, where."""
    model = os.path.basename(os.path.normpath(args.model))
    return {"what": what, "model": model, "stages": args.stages, **here()}


def here() -> dict[str, str]:
    """`hardware` and `commit` (empty outside of a checkout) of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "commit": commit.stdout.strip(),
    }
