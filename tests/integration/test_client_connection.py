"""What the client sends and whom it trusts: real TLS with certificates made on the spot, metadata, broken servers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from stageline.client import AsyncClient, Backoff, Client, Tls
from stageline.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc

QUICK = Backoff(initial_s=0.05, max_s=0.2)
OUT_OF_TIME = (UnavailableError, DeadlineExceededError)  # the time may be up while the last attempt is on its way


class Service(pb_grpc.InferenceServiceServicer):
    """Notes the metadata of every call and does what it is told."""

    def __init__(self, fails: grpc.StatusCode | None = None) -> None:
        self.fails, self.seen = fails, []

    def GetModel(self, request, context):
        self.seen.append(dict(context.invocation_metadata()))
        return pb.GetModelResponse(name="m")

    def StreamGenerate(self, request, context):
        self.seen.append(dict(context.invocation_metadata()))
        yield pb.StreamGenerateResponse(start=gen.GenerationStart(seed=1))
        if self.fails is not None:
            context.abort(self.fails, "told to")


@contextmanager
def serving(service: Service, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_InferenceServiceServicer_to_server(service, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


class Authority:
    """A CA that signs certificates, by openssl."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                  "-days", "1", "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
        self.pem = (folder / f"{name}.pem").read_bytes()

    def sign(self, host: str) -> tuple[bytes, bytes]:
        """Key and certificate for a host's name."""
        stem = f"{self._name}-{host}"
        self._run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={host}",
                  "-addext", f"subjectAltName=DNS:{host}", "-keyout", f"{stem}.key", "-out", f"{stem}.csr")  # fmt: skip
        self._run("x509", "-req", "-in", f"{stem}.csr", "-CA", f"{self._name}.pem", "-CAkey", f"{self._name}.key",
                  "-CAcreateserial", "-days", "1", "-copy_extensions", "copy", "-out", f"{stem}.pem")  # fmt: skip
        return (self._folder / f"{stem}.key").read_bytes(), (self._folder / f"{stem}.pem").read_bytes()

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"), "foreign")


async def test_mutual_tls_lets_in_who_is_signed_and_nobody_else(ours, foreign):
    credentials = grpc.ssl_server_credentials([ours.sign("gateway.test")], ours.pem, require_client_auth=True)
    key, chain = ours.sign("client.test")
    known = {"root_certificates": ours.pem, "private_key": key, "certificate_chain": chain}
    wrong_key, wrong_chain = foreign.sign("client.test")
    strangers = [
        Tls(**known),  # the certificate is not for 127.0.0.1
        Tls(**{**known, "root_certificates": foreign.pem}, server_name="gateway.test"),
        Tls(root_certificates=ours.pem, server_name="gateway.test"),
        Tls(
            root_certificates=ours.pem, private_key=wrong_key, certificate_chain=wrong_chain, server_name="gateway.test"
        ),
        None,
    ]
    service = Service()
    with serving(service, credentials) as address:
        with Client(address, tls=Tls(**known, server_name="gateway.test")) as client:
            assert client.get_model(timeout_s=10).name == "m"
        async with AsyncClient(address, tls=Tls(**known, server_name="gateway.test")) as other:
            assert (await other.get_model(timeout_s=10)).name == "m"
        for tls in strangers:
            with Client(address, tls=tls, backoff=QUICK) as client, pytest.raises(OUT_OF_TIME):
                client.get_model(timeout_s=0.5)
    assert len(service.seen) == 2


async def test_every_call_carries_the_key_and_one_name_for_all_attempts():
    service = Service(fails=grpc.StatusCode.UNAVAILABLE)
    with serving(service) as address:
        with Client(address, api_key="k1", metadata=[("x-team", "red")], backoff=QUICK) as client:
            with pytest.raises(OUT_OF_TIME) as caught:
                list(client.stream_generate(gen.Generation(text="a"), timeout_s=1.0))
            client.get_model(request_id="mine")
        async with AsyncClient(address, api_key="k2", backoff=QUICK) as other:
            await other.get_model(request_id="too")
    *attempts, named, last = service.seen
    assert len(attempts) > 2
    assert {call["x-request-id"] for call in attempts} == {caught.value.metadata["request_id"]}
    assert {(call["authorization"], call["x-team"]) for call in service.seen[:-1]} == {("Bearer k1", "red")}
    assert (named["x-request-id"], last["x-request-id"], last["authorization"]) == ("mine", "too", "Bearer k2")


@pytest.mark.parametrize("fails", [None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_server_that_accepts_and_breaks_is_asked_less_and_less_often(fails):
    service, slow = Service(fails), Backoff(initial_s=0.2, max_s=5.0)
    with serving(service) as address:
        with Client(address, backoff=slow) as client, pytest.raises(OUT_OF_TIME):
            list(client.stream_generate(gen.Generation(text="a"), timeout_s=1.5))
        async with AsyncClient(address, backoff=slow) as other:
            with pytest.raises(OUT_OF_TIME):
                await other.generate(gen.Generation(text="a"), timeout_s=1.5)
    assert 4 <= len(service.seen) <= 40  # full jitter may be short, but not every time


def test_exhausted_without_a_time_to_come_back_is_final():
    service = Service(fails=grpc.StatusCode.RESOURCE_EXHAUSTED)
    with serving(service) as address, Client(address, backoff=QUICK) as client:
        began = time.monotonic()
        with pytest.raises(ResourceExhaustedError):
            client.generate(gen.Generation(text="a"), timeout_s=30)
        assert time.monotonic() - began < 10
    assert len(service.seen) == 1
