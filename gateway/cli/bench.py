"""Measure a running server (latency, throughput, serving), this host's transport, or how fast weights load."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from typing import Any

import grpc.aio

from gateway.bench.load import Generator, Shape
from gateway.bench.loading import loading
from gateway.bench.measure import Figures, latency, serving, throughput
from gateway.bench.transport import transport
from gateway.cli.connection import Connection, add_connection_arguments, connection_from
from gateway.cli.servers import failure
from stageline.errors import ConfigError

WHAT = ("latency", "throughput", "serving", "transport", "load")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline bench`."""
    parser.add_argument("what", choices=WHAT)
    add_connection_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="serving: the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="serving: the longest answer")
    parser.add_argument("--streams", type=int, default=16, help="throughput: requests at a time")
    parser.add_argument("--requests", type=int, default=100, help="serving: how many")
    parser.add_argument("--rate", type=float, default=1.0, help="serving: requests a second (Poisson)")
    parser.add_argument("--payload-bytes", type=int, default=32 << 20, help="transport: bytes a transfer")
    parser.add_argument("--model", metavar="FOLDER", help="load: a checkpoint folder in the Hugging Face layout")
    parser.add_argument("--layers", metavar="START-END", default="", help="load: one stage's; default: the whole model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="load: what is loaded to")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    for name in ("prompt_tokens", "new_tokens", "streams", "requests", "rate", "payload_bytes", "repeats"):
        if not getattr(args, name) > 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError("CONFIG_INVALID", f"{flag} must be over 0, got {getattr(args, name)}", field=flag)
    connection = Connection("") if args.what in ("transport", "load") else connection_from(args)
    try:
        figures = asyncio.run(_measure(args, connection))
    except grpc.aio.AioRpcError as error:
        raise failure(error, connection.address) from None
    report = {"what": args.what, **figures, "hardware": f"{os.cpu_count()} cores, {platform.machine()}"}
    print(json.dumps(report, indent=2) if args.output == "json" else table(report))
    return 0


async def _measure(args: argparse.Namespace, connection: Connection) -> Figures:
    if args.what == "transport":
        names = ("certificate_file", "key_file", "ca_file", "server_name")
        tls = {name: value for name in names if (value := getattr(args, name))}
        return await transport(args.payload_bytes, args.repeats, tls)
    if args.what == "load":
        return await asyncio.to_thread(loading, args.model, args.layers, args.dtype, args.repeats)
    how: dict[str, Any] = {
        "credentials": connection.credentials,
        "options": connection.options,
        "metadata": connection.metadata,
    }
    async with Generator(connection.address, args.seed, **how) as load:
        shape = Shape(args.prompt_tokens, args.new_tokens)
        about = {"model": load.model.name, "prompt_tokens": shape.prompt_tokens, "new_tokens": shape.new_tokens}
        if args.what == "latency":
            return about | await latency(load, shape, args.repeats)
        if args.what == "throughput":
            return about | await throughput(load, shape, args.streams, args.repeats)
        shapes = load.conversation(args.requests, args.prompt_tokens, args.new_tokens)
        return about | await serving(load, shapes, args.rate)


def table(report: dict[str, Any]) -> str:
    """One line a figure; nested figures as `name.part`."""
    flat: dict[str, Any] = {}
    for name, value in report.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{part}": inner for part, inner in value.items()})
        else:
            flat[name] = value
    width = max(len(name) for name in flat)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in flat.items())
