"""`python -m gateway.batch.dataset`: run a dataset of requests on a server, as a Ray Data job."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from gateway.batch.dataset.door import Door, DoorSettings
from gateway.batch.dataset.names import check_files, error_file
from gateway.cli.connection import KEY_VARIABLE, api_key
from stageline.errors import ConfigError, InvalidArgumentError, StagelineError

PROGRAM = "python -m gateway.batch.dataset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument(
        "input", metavar="INPUT", help="requests in OpenAI's batch format: a .jsonl or .parquet file, a folder or pattern of "
        "such files, by path or fsspec URL (s3://, gs://)",
    )  # fmt: skip
    parser.add_argument(
        "--output-file", required=True, metavar="OUT", help="answers: a path or URL, .jsonl or .parquet"
    )
    parser.add_argument("--error-file", metavar="FILE", help="lines that failed, .jsonl; default: OUT.errors.jsonl")
    parser.add_argument("--address", required=True, metavar="URL", help="the server's HTTP door: http://HOST:PORT")
    parser.add_argument("--ca-file", metavar="PEM", help="for https: this authority is trusted")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"file with the API key; default: ${KEY_VARIABLE}")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at the server at once")
    parser.add_argument("--workers", type=int, default=1, help="processes that send them")
    parser.add_argument(
        "--give-up-s",
        type=float,
        default=600.0,
        help="end when no server has answered for so long; the job can go on later",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 every line has a result (failed lines are in the error file), 1 it can go on later, 2 the command or
    the whole input is wrong."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").partition(": ")[2], allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except StagelineError as error:
        print(f"{PROGRAM}: {error.message} [{error.reason}]", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgumentError) else 1


def _run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    url = urlsplit(args.address)
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/") or url.query:
        raise ConfigError(
            "ADDRESS_INVALID",
            f"--address {args.address}: expected http://HOST:PORT of the HTTP door",
            field="--address",
        )
    errors = args.error_file or error_file(args.output_file)
    check_files(args.input, args.output_file, errors)
    missing = [name for name in ("fsspec", "pandas", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "DATASET_EXTRA_MISSING", f"{', '.join(missing)} are not installed; pip install 'stageline[dataset]'"
        )
    from gateway.batch.dataset.job import DatasetJob, run_dataset

    door = DoorSettings(
        address=args.address, api_key=api_key(args.api_key_file), ca_file=args.ca_file, give_up_s=args.give_up_s
    )
    job = DatasetJob(
        input=args.input, output=args.output_file, errors=errors, door=door, concurrency=args.concurrency,
        workers=args.workers,
    )  # fmt: skip
    asyncio.run(_reach(door))
    plan = run_dataset(job, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{plan.batch_id}: {plan.completed} answers in {job.output}, {plan.failed} errors in {job.errors}")
    return 0


async def _reach(settings: DoorSettings) -> None:
    """Before anything is read: there is a server, and it takes the key."""
    door = Door(settings)
    try:
        await door.check()
    finally:
        await door.close()


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value, most in (("--concurrency", args.concurrency, 65536), ("--workers", args.workers, 1024)):
        if not 1 <= value <= most:
            raise ConfigError("CONFIG_INVALID", f"{name} must be from 1 to {most}, got {value}", field=name)
    if not 0 <= args.give_up_s < float("inf"):
        raise ConfigError(
            "CONFIG_INVALID", f"--give-up-s must be at least 0, got {args.give_up_s}", field="--give-up-s"
        )
