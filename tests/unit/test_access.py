"""Buckets, keys and the commands that make them."""

from __future__ import annotations

import datetime
import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access import audit, keys
from gateway.access.keys import Tenant, Tenants, digest, new_key
from gateway.access.limits import Bucket
from gateway.access.visit import Account, Visit
from gateway.cli import main
from gateway.config import load
from stageline.errors import ConfigError, UnauthenticatedError
from stages.server.access import StageAccess

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


@given(st.integers(1, 10_000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20_000)), max_size=60))
def test_no_more_than_a_minutes_worth_and_what_flows_in_is_ever_admitted(per_minute, asked):
    """A request is admitted when its wait is 0; one may overdraw, and who asks after the wait that was named is served."""
    bucket, now_s, used = Bucket.full(per_minute, 0.0), 0.0, 0
    for pause_s, amount in asked:
        now_s += pause_s
        if (wait_s := bucket.wait_s(amount, now_s)) > 0:
            assert wait_s <= 60 * (used + amount) / per_minute
            now_s += wait_s + 1e-6
            assert bucket.wait_s(amount, now_s) == pytest.approx(0, abs=1e-5)
        before = used
        bucket.take(amount, now_s)
        used += amount
        assert before <= per_minute + per_minute * now_s / 60 + 1e-3


def test_a_changed_limit_takes_effect_and_forgets_no_debt():
    bucket = Bucket.full(60, 0.0)
    bucket.take(100, 0.0)
    bucket.limit(120, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(0 if bucket.level >= 1 else (1 - bucket.level) / 2)
    assert bucket.level == 20  # what the larger bucket holds more
    bucket.limit(60, 0.0)
    assert bucket.level == 20
    bucket.limit(None, 0.0)
    assert bucket.wait_s(10**9, 0.0) == 0
    bucket.limit(5, 10.0)
    assert (bucket.level, bucket.wait_s(6, 10.0)) == (5, 0)


def test_a_key_is_known_by_its_hash_until_it_expires():
    key, stored = new_key(NOW, NOW + datetime.timedelta(days=1))
    assert stored.sha256 == digest(key)
    assert key not in repr(stored)
    assert stored.sha256 not in repr(stored)
    tenants = Tenants({"red": Tenant(keys=(stored,)), "blue": Tenant()})
    assert (tenants.holder(key, NOW).tenant, tenants.holder(key, NOW).key_id) == ("red", key[3:15])
    for wrong in (key[:-1], key + "0", key.upper(), "", "sl-", stored.sha256, "\udcff" * 80):
        with pytest.raises(UnauthenticatedError, match="not known") as caught:
            tenants.holder(wrong, NOW)
        assert not wrong or wrong not in caught.value.message
    with pytest.raises(UnauthenticatedError, match="expired"):
        tenants.holder(key, NOW + datetime.timedelta(days=2))
    with pytest.raises(ConfigError, match="two keys"):
        Tenants({"red": Tenant(keys=(stored,)), "blue": Tenant(keys=(stored,))})
    assert keys.parse([keys.dump(tenants.tenants).encode()]).tenants == tenants.tenants


def test_strangers_cannot_fill_the_audit_log_and_tenants_lose_no_line(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(audit.time, "monotonic", lambda: clock[0])
    log = audit.Audit(str(tmp_path / "audit.jsonl"))
    known = Visit(Account.opened("red", Tenant()))
    call = {"door": "grpc", "method": "/m", "peer": "p", "request_id": "r", "status": "OK", "duration_s": 0.0}
    for visit in (None, known):
        for _ in range(1000):
            log.record(**call, visit=visit)
    clock[0] += 1
    log.record(**call)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["tenant"] for line in lines] == [None] * 600 + ["red"] * 1000 + [None]
    assert [line.get("not_recorded") for line in lines] == [None] * 1600 + [400]


def test_the_commands_make_list_and_revoke(tmp_path, capsys):
    file = tmp_path / "keys.yaml"

    def cli(*args: str) -> tuple[int, str, str]:
        code = main(["keys", *args, "--file", str(file)])
        return code, *capsys.readouterr()

    code, key, note = cli("create", "--tenant", "red", "--expires-days", "30")
    key = key.strip()
    assert code == 0
    assert key not in note
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    text = file.read_text().replace("red:", "red:\n    requests_per_minute: 60")
    file.write_text(text)
    other = cli("create", "--tenant", "red")[1].strip()
    assert key[-64:] not in file.read_text()
    listed = cli("list")[1]
    assert "tenant red requests_per_minute=60" in listed
    assert key[3:15] in listed
    assert key[-64:] not in listed
    assert digest(key) not in listed
    assert cli("revoke", "--id", key[3:15])[0] == 0
    tenants = keys.parse([file.read_bytes()])
    assert tenants.holder(other, NOW).tenant == "red"
    with pytest.raises(UnauthenticatedError):
        tenants.holder(key, NOW)
    for args, says in (
        (("revoke", "--id", "0" * 12), "KEY_NOT_FOUND"),
        (("create", "--tenant", "not a name"), "KEYS_INVALID"),
        (("create", "--tenant", "red", "--expires-days", "-1"), "--expires-days"),
    ):
        code, out, problem = cli(*args)
        assert (code, out) == (2, "")
        assert says in problem
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_the_configuration_holds_names_of_files_and_no_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STAGELINE_API_KEY", "sl-hunter2")
    monkeypatch.setenv("STAGELINE_SECURITY__KEYS_FILE", "keys.yaml")
    (tmp_path / "config.yaml").write_text("security: {stage_token_file: token, audit_prompts: true}")
    assert main(["config", "--config", str(tmp_path / "config.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "keys_file: keys.yaml" in shown
    assert "stage_token_file: token" in shown
    assert "hunter2" not in shown
    config = load(None, {"security.stage_token_file": "token"}, {}).security
    assert config.absolute().stage_files()["token_file"] == str(tmp_path.cwd() / "token")
    with pytest.raises(ConfigError) as caught:
        load(None, {"security.token": "hunter2"}, {})
    assert "hunter2" not in caught.value.message


def test_the_documented_commands_make_files_that_serve(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    script, settings = re.search(r"## Certificates.*?```bash\n(.*?)```\n```yaml\n(.*?)```", page, re.DOTALL).groups()
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "config.yaml").write_text(settings)
    security = load(str(tmp_path / "config.yaml"), {}, {}).security
    here = {
        name: str(tmp_path / value) for name, value in security.model_dump().items() if name.endswith("_file") and value
    }
    security = security.model_copy(update=here)
    assert security.door_tls() is not None
    assert StageAccess(**security.stage_files()).metadata()
    example = re.search(r"```yaml\n(tenants:.*?)```", page, re.DOTALL)[1]
    example = example.replace("9d5e…", "9d" * 32).replace("[…]", "[]")
    assert keys.parse([example.encode()]).tenants["search"].concurrent_sequences == 32
