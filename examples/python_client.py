"""Stream an answer: `python examples/python_client.py [HOST:PORT] [PROMPT]`. A gateway that dies meanwhile costs a pause."""

from __future__ import annotations

import sys

from stageline.client import Client
from stageline.errors import StagelineError
from stageline.inference.v1 import generation_pb2 as gen


def main() -> int:
    """Print the answer as it comes."""
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?"
    generation = gen.Generation(
        conversation=gen.Conversation(messages=[gen.Message(role="user", content=prompt)]),
        stop=gen.StopConditions(max_tokens=128),
    )
    try:
        with Client(address) as client:
            for message in client.stream_generate(generation, timeout_s=120):
                for delta in message.choices:
                    print(delta.text, end="", flush=True)
    except StagelineError as error:
        print(f"{error.message} [{error.reason}]", file=sys.stderr)
        return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
