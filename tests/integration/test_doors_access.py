"""Keys and limits at both doors, on real sockets, over a real engine with toy stages."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from doors_helpers import Doors, open_doors
from engine_helpers import NUM_LAYERS, Cluster, all_free, byte_tokenizer, expected_tokens, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from stage_server_helpers import ending, refusal

from gateway.access import Audit, Doorkeeper
from gateway.access.keys import StoredKey, Tenant, dump, new_key
from gateway.api.service import Frontend
from stageline.client import AsyncClient, Tls
from stageline.errors import ConfigError, ResourceExhaustedError, UnavailableError
from stageline.grpc_errors import from_rpc_error
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc
from stageline.operations.v1 import operations_service_pb2 as operations_pb
from stageline.operations.v1 import operations_service_pb2_grpc as operations_grpc
from stages.tls import TlsFiles
from tests.certificates import Authority, replace

NOW = datetime.datetime.now(datetime.UTC)
SECRET_PROMPT = "attack at dawn"


@dataclass
class House:
    """Doors over a toy engine, tenants with a key each, and what the audit log says."""

    folder: Path
    doors: Doors
    cluster: Cluster
    keys: dict[str, str]
    stored: dict[str, StoredKey]

    def write(self, **policies: dict) -> None:
        """The file of tenants, anew."""
        tenants = {name: Tenant(keys=(self.stored[name],), **policy) for name, policy in policies.items()}
        replace(self.folder / "keys.yaml", dump(tenants).encode())

    def audited(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]

    def client(self, name: str, **options) -> AsyncClient:
        return AsyncClient(self.doors.grpc, api_key=self.keys[name], **options)

    def http(self, name: str | None = None) -> httpx.AsyncClient:
        headers = {} if name is None else {"authorization": f"Bearer {self.keys[name]}"}
        return httpx.AsyncClient(base_url=self.doors.http, headers=headers)


@asynccontextmanager
async def house(
    folder: Path,
    *,
    tls: TlsFiles | None = None,
    prompts: bool = False,
    delay_s: float = 0.0,
    num_blocks: int = 512,
    **policies: dict,
):
    made = {name: new_key(NOW, None) for name in policies}
    here = House(
        folder, Doors(), Cluster(), {n: key for n, (key, _) in made.items()}, {n: one for n, (_, one) in made.items()}
    )
    here.write(**policies)
    keeper = Doorkeeper(str(folder / "keys.yaml"), Audit(str(folder / "audit.jsonl"), prompts=prompts))
    try:
        await here.cluster.add_stage(0, 2, delay_s=delay_s, num_blocks=num_blocks)
        await here.cluster.add_stage(2, NUM_LAYERS, num_blocks=num_blocks)
        engine = await here.cluster.start()
        await asyncio.wait_for(engine.wait_ready(), 20)
        here.doors.frontend = Frontend(engine, byte_tokenizer(), None, engine.model, keeper)
        async with open_doors(here.doors, tls=tls):
            yield here
        assert all(account.num_sequences == 0 for account in keeper._accounts.values())
        await until(lambda: all_free(engine))
    finally:
        await here.cluster.stop()


def asked(prompt=(5, 6, 7), count: int = 8, **fields) -> gen.Generation:
    return gen.Generation(
        token_ids=gen.TokenIds(ids=prompt), sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopConditions(max_tokens=count), **fields,
    )  # fmt: skip


def body(prompt=(5, 6, 7), count: int = 8, **fields) -> dict:
    return {"prompt": list(prompt), "max_tokens": count, "temperature": 0, **fields}


async def test_without_a_right_key_nothing_is_served_but_health(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    async with house(tmp_path, red={}, old={}) as here:
        expired = here.stored["old"].model_copy(update={"expires": NOW - datetime.timedelta(seconds=1)})
        here.stored["old"] = expired
        here.write(red={}, old={})
        right = here.keys["red"]
        wrong = {
            None: "API_KEY_MISSING",
            "": "API_KEY_MISSING",
            f"Basic {right}": "API_KEY_MISSING",
            "Bearer": "API_KEY_MISSING",
            "Bearer x": "API_KEY_WRONG",
            f"Bearer {right[:-1]}{'1' if right[-1] == '0' else '0'}": "API_KEY_WRONG",
            f"Bearer {right}0": "API_KEY_WRONG",
            f"Bearer sl-{'0' * 12}-{right[-64:]}": "API_KEY_WRONG",
            f"Bearer {here.stored['red'].sha256}": "API_KEY_WRONG",
            f"Bearer {here.keys['old']}": "API_KEY_EXPIRED",
        }
        async with grpc.aio.insecure_channel(here.doors.grpc) as channel, here.http() as http:
            stub = pb_grpc.InferenceServiceStub(channel)
            for header, reason in wrong.items():
                metadata = () if header is None else (("authorization", header),)
                call = stub.Generate(pb.GenerateRequest(generation=asked()), metadata=metadata)
                assert await refusal(call) == ("UNAUTHENTICATED", reason), header
                answer = await http.post(
                    "/v1/completions", json=body(), headers={} if header is None else {"authorization": header}
                )
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, reason.lower()), header
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
            for path in ("/v1/models", "/openapi.json", "/tokenizer_info", "/no/such/path", "//healthz", "/healthz/"):
                assert (await http.get(path)).status_code == 401, path
            for path in ("/healthz", "/readyz"):
                assert (await http.get(path)).status_code == 200
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            assert await ending(reflect(iter([listing]))) == ("UNAUTHENTICATED", "API_KEY_MISSING")
            key = (("authorization", f"Bearer {right}"),)
            assert (await reflect(iter([listing]), metadata=key).read()).list_services_response.service
            assert await refusal(channel.stream_stream("/no.such/Method")().read()) == (
                "UNAUTHENTICATED",
                "API_KEY_MISSING",
            )
        async with here.client("red") as client:
            answer = await client.generate(asked())
            assert list(answer.choices[0].token_ids) == expected_tokens((5, 6, 7), 8, num_stages=2)
        refused = [line for line in here.audited() if line["tenant"] is None]
        assert {line["reason"] for line in refused} == {"API_KEY_MISSING", "API_KEY_WRONG", "API_KEY_EXPIRED"}
    everything = caplog.text + (tmp_path / "audit.jsonl").read_text()
    for key in here.keys.values():
        assert key[16:] not in everything
    for stored in here.stored.values():
        assert stored.sha256 not in everything


async def test_a_tenant_sees_its_own_prefixes_and_no_pipelines(tmp_path):
    prompt = list(range(1, 41))
    async with house(tmp_path, red={}, blue={}, ops={"operator": True}) as here:
        async with here.client("red") as red, here.client("blue") as blue, here.client("ops") as ops:
            cached = [
                (await client.generate(asked(prompt))).usage.cached_prompt_tokens
                for client in (red, red, blue, blue, ops)
            ]
            assert cached[0] == cached[2] == cached[4] == 0
            assert cached[1] == cached[3] > 0
            assert [len((await client.get_model()).pipelines) for client in (red, ops)] == [0, 1]
        async with grpc.aio.insecure_channel(here.doors.grpc) as channel:
            steps = operations_grpc.OperationsServiceStub(channel).StreamSteps
            for name, refused in (("red", True), ("ops", False)):
                call = steps(
                    operations_pb.StreamStepsRequest(), metadata=(("authorization", f"Bearer {here.keys[name]}"),),
                    timeout=0.5,
                )  # fmt: skip
                ended = await ending(call)
                assert ended == (("PERMISSION_DENIED", "OPERATORS_ONLY") if refused else ("DEADLINE_EXCEEDED",) * 2)


async def test_priority_is_served_within_what_a_tenant_may(tmp_path):
    async with house(tmp_path, red={}, blue={"max_priority": 3}) as here:
        seen = []
        generate = here.cluster.engine.generate
        here.cluster.engine.generate = lambda request: (seen.append(request), generate(request))[1]
        async with here.client("red") as red, here.client("blue") as blue:
            for client, priority in ((blue, 3), (blue, -100), (red, 0), (red, -2)):
                await client.generate(asked(priority=priority))
            for client, priority in ((blue, 4), (red, 1)):
                with pytest.raises(Exception, match="may not go before others") as caught:
                    await client.generate(asked(priority=priority))
                assert (caught.value.code, caught.value.reason) == ("PERMISSION_DENIED", "PRIORITY_NOT_ALLOWED")
        async with here.http("red") as http:  # vLLM's sign
            assert (await http.post("/v1/completions", json=body(priority=5))).status_code == 200
            refused = await http.post("/v1/completions", json=body(priority=-1))
            assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert [(one.tenant, one.priority) for one in seen] == [
            ("blue", 3), ("blue", -100), ("red", 0), ("red", -2), ("red", -5),
        ]  # fmt: skip


async def test_limits_hold_at_both_doors_and_say_when_to_come_back(tmp_path):
    policies = {
        "often": {"requests_per_minute": 2},
        "much": {"tokens_per_minute": 60},
        "wide": {"concurrent_sequences": 2},
        "free": {},
    }
    async with house(tmp_path, delay_s=0.01, **policies) as here:

        async def refused(name: str, **fields) -> tuple[str, float]:
            async with grpc.aio.insecure_channel(here.doors.grpc) as channel:
                key = (("authorization", f"Bearer {here.keys[name]}"),)
                request = pb.GenerateRequest(generation=asked(**fields))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await pb_grpc.InferenceServiceStub(channel).Generate(request, metadata=key)
            error = from_rpc_error(caught.value)
            async with here.http(name) as http:
                answer = await http.post("/v1/completions", json=body(n=fields.get("num_choices")))
            assert answer.json()["error"]["code"] == error.reason.lower()
            if isinstance(error, ResourceExhaustedError):
                assert answer.status_code == 429
                assert abs(int(answer.headers["retry-after"]) - float(error.metadata["retry_after_s"])) < 2
            return error.reason, float(error.metadata.get("retry_after_s", 0))

        async with here.client("often") as often, here.client("much") as much, here.client("wide") as wide:
            await often.generate(asked())
            await often.get_model()  # every call counts
            reason, wait_s = await refused("often")
            assert reason == "REQUESTS_PER_MINUTE"
            assert 5 < wait_s <= 30
            await much.generate(asked(range(50), 30))  # 80 tokens, of which the answer's are paid for afterwards
            reason, wait_s = await refused("much")
            assert reason == "TOKENS_PER_MINUTE"
            assert 5 < wait_s <= 23  # 20 owed and 3 asked for, one a second
            streams = [wide.stream_generate(asked(count=150)) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            assert await refused("wide") == ("CONCURRENT_SEQUENCES", 1.0)
            await streams[0].aclose()
            await until(lambda: here.doors.frontend.doorkeeper._accounts["wide"].num_sequences == 1)
            await wide.generate(asked())
            assert await refused("wide", num_choices=3) == ("CONCURRENT_SEQUENCES_OUT_OF_RANGE", 0)
            await streams[1].aclose()
            async with here.http("free") as http:
                assert (await http.post("/v1/completions", json=body())).status_code == 200


async def test_a_call_of_several_prompts_is_paid_for_as_one(tmp_path):
    async with house(tmp_path, red={"tokens_per_minute": 100}) as here, here.http("red") as http:
        prompts = [list(range(1, 40))] * 10
        assert (await http.post("/v1/completions", json={"prompt": prompts, "max_tokens": 1})).status_code == 200
        again = await http.post("/v1/completions", json={"prompt": prompts, "max_tokens": 1})
        assert again.status_code == 429
        assert 150 < int(again.headers["retry-after"]) <= 204  # 10 * (39 + 1) - 100 owed and 39 asked for


@pytest.mark.parametrize("same", [False, True])
async def test_one_tenants_flood_leaves_another_its_share(tmp_path, same: bool):
    """Ten sequences fit at a time and red has 60 in the queue: blue's four come in between. (As red's they come last.)"""
    prompt = list(range(2, 23))
    async with house(tmp_path, num_blocks=64, delay_s=0.002, red={}, blue={}) as here:
        async with here.client("red") as red, here.client("red" if same else "blue") as blue:
            flood = [asyncio.create_task(red.generate(asked((place, 9, *prompt), 8))) for place in range(60)]
            await until(lambda: here.cluster.engine.pipelines()[0].num_waiting_sequences > 40)
            await asyncio.gather(*(blue.generate(asked((100 + place, 9, *prompt), 8)) for place in range(4)))
            num_done = sum(task.done() for task in flood)
            await asyncio.gather(*flood)
    assert num_done > 50 if same else num_done < 40


async def test_keys_change_while_streams_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="stageline.security")
    async with house(tmp_path, delay_s=0.01, red={}, blue={}) as here:
        async with here.client("red") as red, here.client("blue") as blue:
            stream = asyncio.create_task(red.generate(asked(count=150)))
            await blue.generate(asked())
            replace(here.folder / "keys.yaml", b"tenants: {red: {kees: [sl-very-secret]}}")
            await blue.generate(asked())  # a file that cannot be used changes nothing
            assert "keeping what was read before" in caplog.text
            assert "very-secret" not in caplog.text
            here.write(blue={"requests_per_minute": 1})
            assert not stream.done()
            await blue.generate(asked())
            for client, problem in ((blue, "1 requests a minute"), (red, "not known here")):
                with pytest.raises(Exception, match=problem):
                    await client.generate(asked(), timeout_s=0.5)
            assert len((await stream).choices[0].token_ids) == 150


async def test_the_audit_log_has_a_line_for_every_call_and_no_prompt(tmp_path):
    for place, prompts in enumerate((False, True)):
        folder = tmp_path / str(place)
        folder.mkdir()
        async with house(folder, delay_s=0.005, red={}, prompts=prompts) as here:
            async with here.client("red") as red, here.http("red") as http:
                generation = asked(request_id="mine")
                generation.text = SECRET_PROMPT
                await red.generate(generation)
                with pytest.raises(Exception, match="top_p"):
                    await red.generate(gen.Generation(text="x", sampling=gen.SamplingParams(top_p=7), request_id="bad"))
                await http.post("/v1/completions", json=body(SECRET_PROMPT.encode()), headers={"x-request-id": "web"})
                await http.post("/v1/completions", json={"prompt": 7}, headers={"x-request-id": "not"})
                stream = red.stream_generate(asked(count=150, request_id="left"))
                await anext(stream)
                await stream.aclose()
            (folder / "audit.jsonl").rename(folder / "moved")  # as rotation does
            async with here.client("red") as red:
                await red.get_model(request_id="after")
        lines = {line["request_id"]: line for line in map(json.loads, (folder / "moved").read_text().splitlines())}
        lines |= {line["request_id"]: line for line in here.audited()}
        assert set(lines) == {"mine", "bad", "web", "not", "left", "after"}
        mine, web = lines["mine"], lines["web"]
        assert (mine["door"], mine["tenant"], mine["key_id"]) == ("grpc", "red", here.stored["red"].id)
        assert (mine["prompt_tokens"], mine["completion_tokens"]) == (len(byte_tokenizer().encode(SECRET_PROMPT)), 8)
        assert (web["door"], web["method"], web["completion_tokens"]) == ("http", "POST /v1/completions", 8)
        outcomes = {name: (line["status"], line["reason"]) for name, line in lines.items()}
        assert outcomes == {
            "mine": ("OK", ""), "bad": ("INVALID_ARGUMENT", "TOP_P_OUT_OF_RANGE"), "web": ("200", ""), "not": ("400", ""),
            "left": ("CANCELLED", ""), "after": ("OK", ""),
        }  # fmt: skip
        text = (folder / "moved").read_text() + (folder / "audit.jsonl").read_text()
        assert (SECRET_PROMPT in text) == prompts
        assert "authorization" not in text.lower()


async def test_tls_at_the_public_port_with_and_without_client_certificates(tmp_path):
    ours, foreign = Authority("ours"), Authority("foreign")
    files = ours.issue(tmp_path / "door")
    (tmp_path / "house").mkdir()
    certificate, key = ours.sign()
    mutual = {"private_key": key, "certificate_chain": certificate}
    for ca_file, known, strangers in (
        (None, [{}, mutual], [{"root_certificates": foreign.pem}, None]),
        (files["ca_file"], [mutual], [{}, None, *map(_pair, (foreign.sign(), ours.sign(expired=True)))]),
    ):
        tls = TlsFiles(files["certificate_file"], files["key_file"], ca_file)
        async with house(tmp_path / "house", tls=tls, red={}) as here:
            for how in known:
                async with here.client("red", tls=Tls(**{"root_certificates": ours.pem, **how})) as client:
                    assert (await client.get_model(timeout_s=10)).name == "toy"
            for how in strangers:
                how = how if how is None else Tls(**{"root_certificates": ours.pem, **how})
                async with here.client("red", tls=how) as client:
                    with pytest.raises(UnavailableError):
                        await client.get_model(timeout_s=0.5)
            if ca_file is None:  # a new certificate, while we serve
                replace(tmp_path / "door" / "tls.pem", b"half")
                async with here.client("red", tls=Tls(root_certificates=ours.pem)) as client:
                    await client.get_model(timeout_s=10)
                foreign.issue(tmp_path / "door")
                async with here.client("red", tls=Tls(root_certificates=foreign.pem)) as client:
                    await client.get_model(timeout_s=10)
                files = ours.issue(tmp_path / "door")


def _pair(signed: tuple[bytes, bytes]) -> dict[str, bytes]:
    return {"certificate_chain": signed[0], "private_key": signed[1]}


async def test_reflection_can_be_left_out():
    async with open_doors(Doors(), with_reflection=False) as doors, grpc.aio.insecure_channel(doors.grpc) as channel:
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
        assert await ending(call) == ("UNIMPLEMENTED", "UNIMPLEMENTED")


async def test_the_openai_client_sends_its_key(tmp_path):
    async with house(tmp_path, red={}) as here:
        async with openai.AsyncOpenAI(base_url=f"{here.doors.http}/v1", api_key=here.keys["red"]) as client:
            assert [model.id async for model in await client.models.list()] == ["toy"]
        async with openai.AsyncOpenAI(base_url=f"{here.doors.http}/v1", api_key="sk-other") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xff", "not UTF-8"),
        (b"tenants: {", "not YAML"),
        (b"tenants: {a: {keys: [{id: abc, sha256: hunter2}]}}", "tenants.a.keys.0.id"),
        (b"tenants: {a: {requests_per_minute: 0}}", "requests_per_minute"),
        (b"tenants: {'a b': {}}", "tenants.a b"),
        (b"sl-hunter2", "the top"),
    ],
)
def test_a_wrong_file_of_keys_is_named_without_what_it_says(tmp_path, text: bytes, says: str):
    (tmp_path / "keys.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=says) as caught:
        Doorkeeper(str(tmp_path / "keys.yaml"))
    assert caught.value.reason == "KEYS_INVALID"
    assert "hunter2" not in caught.value.message
