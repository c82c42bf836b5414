"""Stage ports refuse strangers: real TLS and real tokens, on real sockets, with a toy model behind them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine_helpers import NUM_LAYERS, Cluster, collect, expected_tokens, request, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stage_server_helpers import ending, refusal

from stageline.errors import ConfigError
from stageline.stage.v1 import stage_service_pb2 as pb
from stageline.stage.v1 import stage_service_pb2_grpc as pb_grpc
from stages.server.access import OPEN, StageAccess
from stages.server.link import FORWARD, OPTIONS, RESULTS
from tests.certificates import Authority, replace

TOKEN, OTHER = (hashlib.sha256(name).hexdigest() for name in (b"token", b"other"))
REFUSED = ("UNAUTHENTICATED", "STAGE_TOKEN_WRONG")


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority("ours")


def access(
    folder: Path, authority: Authority | None, *tokens: str, server_name: str | None = None, **how
) -> StageAccess:
    """Of a process whose files are in `folder`."""
    files = {} if authority is None else authority.issue(folder, **how)
    if tokens:
        folder.mkdir(exist_ok=True)
        replace(folder / "token", "\n".join(tokens).encode())
        files["token_file"] = str(folder / "token")
    return StageAccess(**files, server_name=server_name)


@asynccontextmanager
async def serving(who: StageAccess, **faults):
    """A pipeline of two stages and the engine that owns it."""
    cluster = Cluster(access=who)
    try:
        await cluster.add_stage(0, 2, **faults)
        await cluster.add_stage(2, NUM_LAYERS)
        await cluster.start()
        await asyncio.wait_for(cluster.engine.wait_ready(), 20)
        yield cluster
    finally:
        await cluster.stop()


async def answer(cluster: Cluster, prompt=(5, 6, 7), count: int = 16) -> None:
    """The pipeline says what it should."""
    got = (await asyncio.wait_for(collect(cluster.engine, request(prompt, max_tokens=count)), 20))[0].token_ids
    assert got == expected_tokens(prompt, count, num_stages=2)


async def described(cluster: Cluster, who: StageAccess, timeout_s: float = 3.0) -> pb.DescribeResponse:
    async with who.channel(cluster.stages[0].record.address, OPTIONS) as channel:
        return await pb_grpc.StageServiceStub(channel).Describe(pb.DescribeRequest(), timeout=timeout_s)


async def test_with_certificates_and_a_token_streams_run_and_strangers_do_not_get_in(ours, tmp_path, caplog):
    foreign = Authority("foreign")
    mine = access(tmp_path / "mine", ours, TOKEN, server_name="stage.test")
    strangers = {
        "plain text": access(tmp_path / "1", None, TOKEN),
        "foreign authority": access(tmp_path / "2", foreign, TOKEN, trusts=ours),
        "expired": access(tmp_path / "3", ours, TOKEN, expired=True),
        "trusts another authority": access(tmp_path / "4", ours, TOKEN, trusts=foreign),
        "expects another name": access(tmp_path / "5", ours, TOKEN, server_name="elsewhere.test"),
    }
    caplog.set_level(logging.DEBUG)
    async with serving(mine) as cluster:
        assert (await described(cluster, mine)).num_layers == NUM_LAYERS
        refused = await asyncio.gather(*(refusal(described(cluster, who)) for who in strangers.values()))
        assert dict(zip(strangers, refused, strict=True)) == dict.fromkeys(strangers, ("UNAVAILABLE", "UNAVAILABLE"))
        for tokens in ((), (OTHER,)):
            stranger = access(tmp_path / f"token{len(tokens)}", ours, *tokens)
            assert await refusal(described(cluster, stranger)) == REFUSED
        await answer(cluster)
    assert "without the stages' token" in caplog.text
    assert TOKEN not in caplog.text
    assert OTHER not in caplog.text


async def test_no_method_of_any_service_is_open_without_the_token(tmp_path):
    mine = access(tmp_path, None, TOKEN)
    async with serving(mine) as cluster, OPEN.channel(cluster.stages[0].record.address, OPTIONS) as channel:
        stub = pb_grpc.StageServiceStub(channel)
        record = (await described(cluster, mine)).incarnation
        calls = [
            stub.Describe(pb.DescribeRequest()),
            stub.Claim(pb.ClaimRequest(owner_id="thief", incarnation=record, lease_s=60)),
            stub.Connect(pb.ConnectRequest(epoch=1)),
            stub.Renew(pb.RenewRequest(epoch=1)),
            stub.Release(pb.ReleaseRequest(epoch=1, incarnation=record)),
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),
            channel.stream_unary(FORWARD)(metadata=(("stageline-epoch", "1"), ("authorization", f"bearer {TOKEN}"))),
            channel.stream_unary("/no.such.Service/Method")(),
        ]
        assert [await refusal(call) for call in calls] == [REFUSED] * len(calls)
        streams = [
            stub.Watch(pb.WatchRequest(epoch=1), metadata=(("authorization", f"Bearer {OTHER}"),)),
            channel.unary_stream(RESULTS)(b"", metadata=(("authorization", f"Bearer {TOKEN[:-1]}"),)),
        ]
        assert [await ending(call) for call in streams] == [REFUSED] * len(streams)
        await answer(cluster)  # the thief got nothing


async def test_an_expired_stage_is_not_spoken_to(ours, tmp_path):
    good, expired = access(tmp_path / "good", ours), access(tmp_path / "stage", ours, expired=True)
    for stage, hears in ((good, ("UNIMPLEMENTED", "UNIMPLEMENTED")), (expired, ("UNAVAILABLE", "UNAVAILABLE"))):
        server = stage.server(OPTIONS)
        port = stage.bind(server)("127.0.0.1:0")
        await server.start()
        async with good.channel(f"127.0.0.1:{port}", OPTIONS) as channel:
            call = pb_grpc.StageServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
            assert await refusal(call) == hears
        await server.stop(0)


async def test_certificates_and_tokens_are_replaced_while_streams_run(ours, tmp_path, caplog):
    folder, new = tmp_path / "mine", Authority("new")
    mine = access(folder, ours, TOKEN)
    before = access(tmp_path / "before", ours, TOKEN)
    caplog.set_level(logging.INFO, logger="stageline.security")
    async with serving(mine, delay_s=0.01) as cluster:
        stream = asyncio.create_task(collect(cluster.engine, request((5, 6, 7), max_tokens=150)))
        await described(cluster, before)
        for broken in (b"", b"no certificate"):  # half a replacement changes nothing
            replace(folder / "tls.pem", broken)
            assert (await described(cluster, before)).num_layers == NUM_LAYERS
        access(folder, new, OTHER)
        assert await refusal(described(cluster, before)) == ("UNAVAILABLE", "UNAVAILABLE")
        assert (await described(cluster, access(tmp_path / "after", new, OTHER))).num_layers == NUM_LAYERS
        assert await refusal(described(cluster, access(tmp_path / "after", new, TOKEN))) == REFUSED
        assert not stream.done(), "replace the files while the stream runs"
        epoch = cluster.engine.pipelines()[0].epoch
        assert (await stream)[0].token_ids == expected_tokens((5, 6, 7), 150, num_stages=2)
        assert cluster.engine.pipelines()[0].epoch == epoch  # the old connections went on
        lost = cluster.stages[0]
        await cluster.kill(lost)  # what is opened now speaks with the new files
        await cluster.add_stage(0, 2)
        await until(lambda: cluster.engine.ready() and cluster.engine.pipelines()[0].epoch != epoch)
        await answer(cluster)
    assert "keeping what was read before" in caplog.text
    assert TOKEN not in caplog.text
    assert OTHER not in caplog.text


def test_wrong_files_are_named_and_nothing_secret_is(ours, tmp_path):
    good = ours.issue(tmp_path / "good")
    other = ours.issue(tmp_path / "other")
    (tmp_path / "short").write_text("hunter2")
    (tmp_path / "spaces").write_text("s3cret " * 8)
    (tmp_path / "empty").write_text("\n")
    wrong = [
        ({"token_file": str(tmp_path / "missing")}, "SECURITY_FILE_UNREADABLE", "missing"),
        ({"token_file": str(tmp_path / "short")}, "TOKEN_INVALID", "32 to 1024"),
        ({"token_file": str(tmp_path / "spaces")}, "TOKEN_INVALID", "without spaces"),
        ({"token_file": str(tmp_path / "empty")}, "TOKEN_INVALID", "one token a line"),
        ({**good, "key_file": other["key_file"]}, "CERTIFICATE_INVALID", "unencrypted key"),
        ({**good, "certificate_file": str(tmp_path / "short")}, "CERTIFICATE_INVALID", "short"),
        ({**good, "ca_file": str(tmp_path / "short")}, "CERTIFICATE_INVALID", "no PEM certificates"),
        ({**good, "key_file": None}, "TLS_INCOMPLETE", "belong together"),
        ({**good, "ca_file": None}, "TLS_INCOMPLETE", "mutual"),
        ({"server_name": "stage.test"}, "TLS_INCOMPLETE", "without certificates"),
    ]
    for files, reason, says in wrong:
        with pytest.raises(ConfigError, match=says) as caught:
            StageAccess(**files)
        assert caught.value.reason == reason
        assert "hunter2" not in caught.value.message
        assert "s3cret" not in caught.value.message
