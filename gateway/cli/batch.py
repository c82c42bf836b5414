"""Run files of requests on a server, or datasets on a cluster: submit, get, list, cancel, delete."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gateway.batch.records import batch_object
from gateway.batch.types import Batch
from gateway.cli.batch_cluster import add_cluster_arguments, check_flags, run_on_cluster
from gateway.cli.batch_job import BatchClient, Job, describe, run_job
from gateway.cli.connection import add_connection_arguments, connection_from
from stageline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline batch`."""
    verbs = parser.add_subparsers(dest="batch_verb", required=True, metavar="VERB")
    submit = verbs.add_parser(
        "submit", help="send a file of requests; the same command again goes on with the same batch"
    )
    submit.add_argument("input", metavar="INPUT.jsonl", help="one request a line, in OpenAI's batch format")
    submit.add_argument("--output-file", required=True, metavar="OUT.jsonl", help="answers, once the batch has ended")
    submit.add_argument("--error-file", metavar="FILE", help="lines that failed; default: OUT.errors.jsonl")
    submit.add_argument("--wait", action="store_true", help="stay until the batch has ended and the files are written")
    submit.add_argument("--window-s", type=int, default=0, help="give lines up that have not run after so many seconds")
    get = verbs.add_parser("get", help="how far a batch is")
    cancel = verbs.add_parser("cancel", help="stop a batch; results that are there stay")
    delete = verbs.add_parser("delete", help="forget a batch that has ended")
    for one in (get, cancel, delete):
        one.add_argument("id", metavar="ID")
    listed = verbs.add_parser("list", help="batches, the newest first")
    listed.add_argument("--limit", type=int, default=20, help="how many, up to 100")
    for one in (submit, get, cancel, listed):
        add_cluster_arguments(one, submit=one is submit)
    for one in (submit, get, cancel, delete, listed):
        add_connection_arguments(one)
        one.add_argument("--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Exits 0 where a batch was completed (failed lines are in the error file), 1 where it was cancelled or expired, or its
    RayJob failed."""
    check_flags(args)
    if args.batch_verb == "list" and not 1 <= args.limit <= 100:
        raise ConfigError("CONFIG_INVALID", f"--limit must be from 1 to 100, got {args.limit}", field="--limit")
    if getattr(args, "kubernetes", False):
        return _on_cluster(args)
    with BatchClient(connection_from(args)) as client:
        if args.batch_verb == "submit":
            return _submit(args, client)
        if args.batch_verb == "list":
            found, more = client.list(args.limit)
            data = [batch_object(batch) for batch in found]
            if args.output == "json":
                print(json.dumps({"object": "list", "data": data, "has_more": more}, indent=2))
            else:
                print("\n".join(map(describe, found)) or "no batches")
            return 0
        if args.batch_verb == "delete":
            client.delete(args.id)
            return 0
        _show(args, client.get(args.id) if args.batch_verb == "get" else client.cancel(args.id))
        return 0


def _on_cluster(args: argparse.Namespace) -> int:
    code, jobs = run_on_cluster(args, None if args.output == "json" else _progress())
    shown = [job.to_dict() if args.output == "json" else job.describe() for job in jobs]
    if args.output == "json":
        print(json.dumps({"object": "list", "data": shown} if args.batch_verb == "list" else shown[0], indent=2))
    else:
        print("\n".join(map(str, shown)) or "no batches")
    return code


def _submit(args: argparse.Namespace, client: BatchClient) -> int:
    output = Path(args.output_file)
    errors = (
        Path(args.error_file)
        if args.error_file
        else output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")
    )
    job = Job(Path(args.input), output, errors, args.window_s)
    note = None if args.output == "json" else _progress()
    batch = run_job(client, job, wait=args.wait, note=note)
    _show(args, batch)
    return 0 if batch.status in ("in_progress", "completed") else 1


def _progress() -> Any:
    """Progress on stderr: one line that is written over on a terminal, else a line whenever something changed."""
    terminal, last = sys.stderr.isatty(), ""

    def note(text: str) -> None:
        nonlocal last
        if text != last:
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
            last = text

    return note


def _show(args: argparse.Namespace, batch: Batch) -> None:
    print(json.dumps(batch_object(batch), indent=2) if args.output == "json" else describe(batch))
