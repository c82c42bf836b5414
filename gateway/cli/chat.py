"""Chat with a running server: one line a turn, answers are streamed; an empty line or end of input ends it."""

from __future__ import annotations

import argparse
import sys

import grpc

from gateway.cli.servers import find
from stageline.grpc_errors import from_rpc_error
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline chat`."""
    parser.add_argument("--address", metavar="HOST:GRPC_PORT", help="default: the server running on this host")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens of one answer at most")
    parser.add_argument("--temperature", type=float, help="default: the model's")


def run(args: argparse.Namespace) -> int:
    """Read turns from stdin; the conversation is kept on this side."""
    messages = [gen.Message(role="system", content=args.system)] if args.system else []
    with grpc.insecure_channel(args.address or find()) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        while line := _read_line():
            messages.append(gen.Message(role="user", content=line))
            generation = gen.Generation(
                conversation=gen.Conversation(messages=messages),
                sampling=gen.SamplingParams(temperature=args.temperature),
                stop=gen.StopConditions(max_tokens=args.max_tokens),
            )
            answer = ""
            try:
                for response in stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation)):
                    for delta in response.choices:
                        answer += delta.text
                        print(delta.text, end="", flush=True)
            except grpc.RpcError as error:
                print(flush=True)
                raise from_rpc_error(error) from None
            print(flush=True)
            messages.append(gen.Message(role="assistant", content=answer))
    return 0


def _read_line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
