"""Chat with a running server: one line a turn, answers are streamed; /exit or end of input ends it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import grpc

from gateway.cli.connection import Connection, add_connection_arguments, connection_from
from gateway.cli.servers import failure
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc

EXIT = "/exit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline chat`."""
    add_connection_arguments(parser)
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, help="tokens of one answer at most; default: what the context holds")
    parser.add_argument("--temperature", type=float, help="default: the model's")


def run(args: argparse.Namespace) -> int:
    """Read turns from stdin; the conversation is kept on this side. Exits 130 after Ctrl-C, as shells expect."""
    messages = [gen.Message(role="system", content=args.system)] if args.system else []
    connection = connection_from(args)
    with connection.channel() as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        try:
            for line in _turns():
                messages.append(gen.Message(role="user", content=line))
                generation = gen.Generation(
                    conversation=gen.Conversation(messages=messages),
                    sampling=gen.SamplingParams(temperature=args.temperature),
                    stop=gen.StopConditions(max_tokens=args.max_tokens),
                )
                messages.append(gen.Message(role="assistant", content=_answer(stub, generation, connection)))
        except KeyboardInterrupt:
            print(flush=True)
            return 130
    return 0


def _answer(stub: pb_grpc.InferenceServiceStub, generation: gen.Generation, connection: Connection) -> str:
    """Print the answer as it comes; returns it whole."""
    pieces = []
    try:
        for response in stub.StreamGenerate(
            pb.StreamGenerateRequest(generation=generation), metadata=connection.metadata
        ):
            for delta in response.choices:
                pieces.append(delta.text)
                print(delta.text, end="", flush=True)
    except grpc.RpcError as error:
        raise failure(error, connection.address) from None
    finally:
        print(flush=True)
    return "".join(pieces)


def _turns() -> Iterator[str]:
    """What the user says, without empty lines."""
    if terminal := sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print(flush=True)
            return
        if line == EXIT:
            return
        if line:
            yield line
