"""Record what every stage of a running server does, for Perfetto, and show how much of the time each computes."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import grpc

from gateway.cli.connection import Connection, add_connection_arguments, connection_from
from gateway.cli.servers import failure
from gateway.timeline.chrome import chrome_trace
from gateway.timeline.clocks import on_one_clock
from gateway.timeline.shares import StageShares, stage_shares
from stageline.errors import ConfigError, UnavailableError
from stageline.operations.v1 import operations_service_pb2 as pb
from stageline.operations.v1 import operations_service_pb2_grpc as pb_grpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline timeline`."""
    add_connection_arguments(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to record")
    parser.add_argument(
        "--output-file", metavar="FILE", help="write Chrome trace events there (open in ui.perfetto.dev)"
    )
    parser.add_argument("--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Record, write the file, print the shares; exits 1 where no step came back meanwhile."""
    if not 0 < args.seconds < math.inf:
        raise ConfigError("CONFIG_INVALID", f"--seconds must be over 0, got {args.seconds}", field="--seconds")
    steps, num_dropped = record(connection_from(args), args.seconds)
    if not steps:
        raise UnavailableError(
            "NO_STEPS", f"no step came back within {args.seconds:g} s; send requests while the timeline is recorded"
        )
    if args.output_file:
        write(Path(args.output_file), steps)
    shares = stage_shares(steps)
    if args.output == "json":
        print(
            json.dumps({"steps": len(steps), "dropped": num_dropped, "stages": [asdict(s) for s in shares]}, indent=2)
        )
    else:
        print(table(shares) + (f"\n{num_dropped} steps were not recorded" if num_dropped else ""))
    return 0


def record(connection: Connection, seconds: float) -> tuple[list[pb.Step], int]:
    """Steps that came back during `seconds`, and how many more there were."""
    steps: list[pb.Step] = []
    num_dropped = 0
    with connection.channel() as channel:
        try:
            for response in pb_grpc.OperationsServiceStub(channel).StreamSteps(
                pb.StreamStepsRequest(), timeout=seconds, metadata=connection.metadata
            ):
                steps += response.steps
                num_dropped += response.num_dropped
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:  # the end we asked for
                raise failure(error, connection.address) from None
    return steps, num_dropped


def write(path: Path, steps: list[pb.Step]) -> None:
    """The trace, or ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(chrome_trace(on_one_clock(steps))))
    except OSError as error:
        raise ConfigError(
            "OUTPUT_NOT_WRITABLE",
            f"cannot write {path}: {error.strerror}; name another --output-file",
            field="--output-file",
        ) from None


def table(shares: list[StageShares]) -> str:
    """One line a stage."""
    lines = [
        f"{'pipeline':>8}  {'layers':>7}  {'steps':>6}  {'computing':>9}  {'idle':>6}  {'on CPU':>6}  {'waits, ms':>9}"
    ]
    lines += [
        f"{s.pipeline:>8}  {s.layers:>7}  {s.num_steps:>6}  {s.computing:>9.1%}  {1 - s.computing:>6.1%}  "
        f"{s.on_cpu:>6.1%}  {s.waiting_ms:>9.2f}"
        for s in shares
    ]
    return "\n".join(lines)
