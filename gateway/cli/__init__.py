"""The `stageline` command: one module a verb. Exit codes: 0 done, 1 failed, 2 the user's input was wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, when grpc is imported; what its core logs, our errors say

from gateway.cli import batch, bench, chat, keys, plan, serve, show_config, simulate, status, timeline
from stageline.errors import InvalidArgumentError, StagelineError

_VERBS = {"serve": serve, "chat": chat, "batch": batch, "plan": plan, "simulate": simulate, "status": status,
          "bench": bench, "timeline": timeline, "config": show_config, "keys": keys}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run a verb, and turn a typed error into one line on stderr."""
    parser = argparse.ArgumentParser(prog="stageline", description="Serve Qwen2 as a pipeline of Ray Serve replicas.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in _VERBS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        verb = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except StagelineError as error:
        print(f"stageline {args.verb}: {error.message} [{error.reason}]", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgumentError) else 1
    except BrokenPipeError:
        return 1
