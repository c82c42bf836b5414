"""`cache_salt` reaches the engine through both doors, and a bad one is refused there."""

from __future__ import annotations

import json

import grpc
import httpx
import pytest
from doors_helpers import Doors, open_doors

from stageline.grpc_errors import from_rpc_error
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc


async def test_both_doors_take_a_salt() -> None:
    async with open_doors(Doors()) as doors:
        async with httpx.AsyncClient(base_url=doors.http, headers={"content-type": "application/json"}) as client:
            for salt, status, reason in (
                ("mine", 200, None),
                ("é" * 128, 200, None),
                ("", 400, "CACHE_SALT_OUT_OF_RANGE"),
                ("é" * 129, 400, "CACHE_SALT_OUT_OF_RANGE"),
                ("\ud800", 400, "CACHE_SALT_INVALID"),
            ):
                for path, what in (
                    ("completions", {"prompt": "a"}),
                    ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
                ):
                    answer = await client.post(
                        f"/v1/{path}", content=json.dumps({**what, "max_tokens": 1, "cache_salt": salt})
                    )
                    assert answer.status_code == status, answer.text
                    if reason is None:
                        assert doors.engine.requests.pop().cache_salt == salt
                    else:
                        assert answer.json()["error"]["code"] == reason.lower()
                        assert answer.json()["error"]["param"] == "cache_salt"
        async with grpc.aio.insecure_channel(doors.grpc) as channel:
            stub = pb_grpc.InferenceServiceStub(channel)
            for salt in ("", "mine"):
                generation = gen.Generation(text="a", stop=gen.StopConditions(max_tokens=1), cache_salt=salt)
                await stub.Generate(pb.GenerateRequest(generation=generation))
                assert doors.engine.requests.pop().cache_salt == salt
            generation.cache_salt = "x" * 257
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(generation=generation))
            error = from_rpc_error(caught.value)
            assert (error.reason, error.metadata["field"]) == ("CACHE_SALT_OUT_OF_RANGE", "generation.cache_salt")
