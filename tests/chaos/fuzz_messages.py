"""Mutated messages of every method of InferenceService. Pure but for the random numbers."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import test_stage_server_fuzz as stage_fuzz

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import scoring_pb2


def good_generation(rng: random.Random) -> gen.Generation:
    """One that is served, with many fields set."""
    what = gen.Generation(model="toy", request_id="r", priority=1)
    what.stop.max_tokens = 2
    match rng.randrange(3):
        case 0:
            what.text = "abc"
        case 1:
            what.token_ids.ids.extend((1, 2, 3))
        case 2:
            what.conversation.messages.add(role="user", content="hi")
            what.conversation.tools.add(name="f", description="d", parameters_json_schema='{"type":"object"}')
    if rng.random() < 0.5:
        what.sampling.CopyFrom(gen.SamplingParams(temperature=0.7, top_p=0.9, top_k=5, seed=7, logit_bias={3: 1.0}))
    if rng.random() < 0.3:
        what.output.CopyFrom(gen.OutputOptions(num_logprobs=2, num_prompt_logprobs=1, echo_prompt=True))
    if rng.random() < 0.3:
        what.stop.stop_strings.extend(("x", "yz"))
    match rng.randrange(8):
        case 0:
            what.constraint.regex = "[ab]+"
        case 1:
            what.constraint.json_schema = '{"type":"object","properties":{"a":{"type":"integer"}}}'
        case 2:
            what.constraint.choice.texts.extend(("yes", "no"))
        case 3:
            what.resume.CopyFrom(gen.Resume(token_ids=[4], model_fingerprint="toy", seed=1))
        case 4:
            what.num_choices = 2
            what.best_of = 3
    return what


def inference_message(rng: random.Random) -> tuple[str, Any]:
    """A method and a request of it that is served."""
    match rng.choice(
        ("Generate", "Generate", "StreamGenerate", "StreamGenerate", "Score", "Tokenize", "Detokenize", "GetModel")
    ):
        case "Generate":
            return "Generate", pb.GenerateRequest(generation=good_generation(rng))
        case "StreamGenerate":
            return "StreamGenerate", pb.StreamGenerateRequest(generation=good_generation(rng))
        case "Score":
            two = [scoring_pb2.Continuation(text="b"), scoring_pb2.Continuation(token_ids=gen.TokenIds(ids=[1, 2]))]
            return "Score", scoring_pb2.ScoreRequest(text="ab", continuations=two, num_logprobs=2)
        case "Tokenize":
            return "Tokenize", pb.TokenizeRequest(text="abc", return_token_bytes=True)
        case "Detokenize":
            return "Detokenize", pb.DetokenizeRequest(token_ids=[1, 2, 3], skip_special_tokens=True)
        case _:
            return "GetModel", pb.GetModelRequest()


def twist(rng: random.Random, message: Any) -> None:
    """Set some of a message's fields, at any depth, to values at the edges of their types."""
    whole = [0, 1, 2, 255, 2**31 - 1, 2**32 - 1]
    values = {
        "int32": [-(2**31), -1, *whole[:5]], "uint32": whole, "uint64": [0, 1, 2**63, 2**64 - 1], "enum": [0, 1, 4, 99],
        "float": [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1e-45, 1.0, 2.0, 3e38],
        "bool": [False, True], "string": ["", "a", "\0", "\U0010ffff", "<|im_start|>", "x" * 3000, "{", "("], "bytes": [b"", b"\xff"],
    }  # fmt: skip
    kinds = {
        1: None,
        2: "float",
        4: "uint64",
        5: "int32",
        8: "bool",
        9: "string",
        12: "bytes",
        13: "uint32",
        14: "enum",
    }
    for one in message.DESCRIPTOR.fields:
        if rng.random() > 0.25:
            continue
        if one.message_type is not None and one.message_type.GetOptions().map_entry:
            getattr(message, one.name)[rng.choice(whole)] = rng.choice(values["float"])
        elif one.message_type is not None:
            inner = getattr(message, one.name)
            twist(rng, inner.add() if one.is_repeated else inner)
        elif (kind := kinds.get(one.type)) is not None:
            if one.is_repeated:
                getattr(message, one.name).extend(rng.choices(values[kind], k=rng.choice((1, 1, 3, 200))))
            else:
                setattr(message, one.name, rng.choice(values[kind]))


def hostile_inference(rng: random.Random) -> tuple[str, bytes]:
    """A method and the bytes of a message for it: bits turned, fields at their edges, or noise."""
    method, message = inference_message(rng)
    kind = rng.randrange(8)
    if kind == 0:
        return method, rng.randbytes(rng.randrange(200))
    if kind <= 3:
        twist(rng, message)
        return method, message.SerializeToString()
    return method, stage_fuzz.mutate(rng, message.SerializeToString())
