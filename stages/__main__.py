"""Serve one stage without Ray: `python -m stages --model M --layers 0-12 --port 7001`; with `--layers any` a spare that a
gateway binds to any stage."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from stageline.errors import ConfigError, InvalidArgumentError, StagelineError
from stages.logs import LOG_FORMATS, log_to_stderr
from stages.partition import parse_layer_ranges
from stages.spec import DEFAULT_SHARED_MEMORY_BYTES, DEVICES, DTYPE_NAMES, HIDDEN_DTYPES, QUANTIZATIONS, StageSpec

UNBOUND = "any"


def _choices(names: tuple[str, ...]) -> str:
    return "{" + ",".join(names) + "}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout, .gguf file, or hub id")
    parser.add_argument(
        "--layers", required=True, help="half-open range of decoder layers, such as 0-12; any: an unbound spare"
    )
    parser.add_argument("--port", type=int, required=True, help="port to listen on; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--dtype", default="bfloat16", metavar=_choices(DTYPE_NAMES))
    parser.add_argument(
        "--quantization", metavar=_choices(QUANTIZATIONS), help="quantize weights while loading (CPU only)"
    )
    parser.add_argument(
        "--hidden-dtype",
        metavar=_choices(HIDDEN_DTYPES),
        help="8-bit hidden states between stages; default: as computed",
    )
    parser.add_argument("--device", default="cpu", metavar=_choices(DEVICES))
    parser.add_argument("--revision", help="hub revision")
    parser.add_argument("--batch-invariant", action="store_true", help="bits do not depend on neighbours (slower)")
    parser.add_argument("--debug-kv", action="store_true", help="check on every read what a KV slot holds (slow)")
    parser.add_argument("--cuda-graphs", action="store_true", help="decode steps as CUDA graphs; not yet run on a GPU")
    parser.add_argument("--block-size-tokens", type=int, help="tokens of a KV block; default 16, on CUDA 256")
    parser.add_argument("--kv-memory-bytes", type=int, help="bytes of the KV cache; default 1 GiB on the CPU")
    parser.add_argument("--num-blocks", type=int, help="KV blocks, instead of --kv-memory-bytes")
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=20.0,
        help="seconds to go on for the owner after SIGTERM; the next signal ends that",
    )
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    parser.add_argument("--certificate-file", metavar="PEM", help="this process's certificate chain: mutual TLS")
    parser.add_argument("--key-file", metavar="PEM", help="its private key")
    parser.add_argument("--ca-file", metavar="PEM", help="the authority that signs all stages and gateways")
    parser.add_argument("--server-name", help="name in the stages' certificates, instead of their addresses")
    parser.add_argument("--token-file", metavar="FILE", help="tokens, one a line: the first is sent, all are accepted")
    parser.add_argument(
        "--shared-memory-bytes",
        type=int,
        default=DEFAULT_SHARED_MEMORY_BYTES,
        help="of the ring to a next stage on this host; 0: hidden states go over the socket",
    )
    parser.add_argument(
        "--log-format", default="text", metavar=_choices(LOG_FORMATS), help="lines on stderr; json: each an object"
    )
    return parser


def _spec(args: argparse.Namespace) -> StageSpec:
    """Raises ConfigError; takes no second, because torch is not loaded yet."""
    values = {key: value for key, value in vars(args).items() if key != "layers"}
    if args.block_size_tokens is None:
        values["block_size_tokens"] = 256 if args.device == "cuda" else 16
    if args.layers == UNBOUND:
        return StageSpec(start_layer=None, end_layer=None, **values)
    ranges = parse_layer_ranges(args.layers)
    if len(ranges) != 1:
        raise ConfigError("LAYERS_NOT_RANGES", f"--layers takes one range, got {args.layers}", field="layers")
    return StageSpec(start_layer=ranges[0].start_layer, end_layer=ranges[0].end_layer, **values)


async def _serve(spec: StageSpec) -> None:
    from stages.replica import StageReplica  # torch takes seconds; --help and a wrong argument should not

    log_to_stderr(spec.log_format, layers=str(spec.layers or UNBOUND))
    replica = StageReplica(spec)
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (now if stop.is_set() else stop).set())
    await replica.start()
    print(f"ready grpc://{replica.address} layers {spec.layers or UNBOUND}", flush=True)
    await stop.wait()
    draining, hurry = asyncio.create_task(replica.drain()), asyncio.create_task(now.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurry.cancel()
    await replica.stop()


def main() -> int:
    """Exit code 0 after SIGINT or SIGTERM, 2 for wrong input, 1 for our own failure."""
    os.environ.setdefault(
        "GRPC_VERBOSITY", "NONE"
    )  # read once, when grpc is imported; what its core logs, our errors say
    args = _parser().parse_args()
    try:
        asyncio.run(_serve(_spec(args)))
    except StagelineError as error:
        print(f"stages: {error.message} [{error.reason}]", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgumentError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
