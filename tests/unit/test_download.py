"""The downloader as the Job runs it: its own process, the real hub client, and a small hub over HTTP that can break off."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from weights_helpers import TINY, random_tensors, write_sharded

from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig
from stages.download import MARK

REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One model. `break_after[name]`: bytes after which the connection is cut, once; `pause_after`: the
    same, but the connection stays open in silence. `corrupt`: files sent wrongly."""

    daemon_threads = True

    def __init__(self, origin: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.origin, self.commit = origin, COMMIT
        self.break_after: dict[str, int] = {}
        self.pause_after: dict[str, int] = {}
        self.paused, self.go_on = threading.Event(), threading.Event()
        self.corrupt: set[str] = set()
        self.sent: list[tuple[str, int]] = []  # (file, first byte asked for)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        if path.startswith(f"/api/models/{REPO}"):
            return self.json(self.model())
        file = self.server.origin / path.rpartition("/")[2]
        if not path.startswith(f"/{REPO}/resolve/{self.server.commit}/") or not file.exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if not path.startswith(f"/{REPO}/") else "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = file.read_bytes()
        if file.name in self.server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{checksum(file)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return None
        self.server.sent.append((file.name, start))
        pause = self.server.pause_after.pop(file.name, None)
        stop = pause or self.server.break_after.pop(file.name, None)
        self.wfile.write(data[start:stop])
        if stop is not None:
            self.wfile.flush()
            if pause is not None:
                self.server.paused.set()
                self.server.go_on.wait(timeout=60)
            self.close_connection = True
            self.connection.shutdown(2)
        return None

    def model(self) -> dict:
        files = []
        for file in sorted(self.server.origin.iterdir()):
            entry = {"rfilename": file.name, "size": file.stat().st_size, "blobId": git_sha1(file)}
            if file.suffix == ".safetensors":
                entry["lfs"] = {"sha256": checksum(file), "size": file.stat().st_size, "pointerSize": 134}
            files.append(entry)
        return {"id": REPO, "modelId": REPO, "sha": self.server.commit, "siblings": files}

    def json(self, data: dict) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def checksum(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git_sha1(file)


def git_sha1(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    origin = tmp_path / "origin"
    write_sharded(origin, TINY, random_tensors(ModelConfig.from_dict(TINY)), 3)
    (origin / "vocab.json").write_text("{}")
    (origin / "pytorch_model.bin").write_text("not needed")
    server = Hub(origin)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def environment(hub: Hub, into: Path) -> dict[str, str]:
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(into.parent / "hf-home"),
        "HF_HUB_OFFLINE": "0",
    }
    return {**os.environ, **ours}


def command(into: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "stages.download", "--model", REPO, "--into", str(into), *args]


def run(hub: Hub, into: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(into, *args), capture_output=True, text=True, timeout=60, env=environment(hub, into))


def shards(hub: Hub) -> list[Path]:
    return sorted(hub.origin.glob("*.safetensors"))


def test_a_complete_verified_folder_with_a_mark(hub: Hub, tmp_path: Path) -> None:
    into = tmp_path / "models" / "tiny"
    done = run(hub, into)
    assert done.returncode == 0, done.stderr
    mark = json.loads((into / MARK).read_text())
    assert mark == json.loads(done.stdout)
    assert mark == {"model": REPO, "commit": COMMIT, "fingerprint": open_checkpoint(str(into)).fingerprint}
    for file in hub.origin.iterdir():
        assert (into / file.name).exists() == (file.name != "pytorch_model.bin")
    hub.sent.clear()
    assert run(hub, into).returncode == 0
    assert hub.sent == []


def test_broken_off_or_killed_it_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    shard = max(shards(hub), key=lambda file: file.stat().st_size)
    killed_at, cut_at = 10_000, 20_000
    assert shard.stat().st_size > cut_at
    into = tmp_path / "tiny"
    part = into / f"{shard.name}.part"
    hub.pause_after = {shard.name: killed_at}
    process = subprocess.Popen(command(into), env=environment(hub, into), stderr=subprocess.DEVNULL)
    try:
        assert hub.paused.wait(timeout=30)
        time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    assert not (into / MARK).exists()
    written = part.stat().st_size
    assert 0 < written <= killed_at
    hub.sent.clear()
    hub.break_after = {shard.name: cut_at}
    done = run(hub, into)
    assert done.returncode == 0, done.stderr
    starts = [start for name, start in hub.sent if name == shard.name]
    assert starts[0] == written
    assert len(starts) == 2
    assert (into / shard.name).read_bytes() == shard.read_bytes()
    assert sorted(path.suffix for path in into.iterdir() if path.suffix == ".part") == []
    assert (into / MARK).exists()


def test_a_wrong_checksum_is_caught_and_mended_by_the_next_run(hub: Hub, tmp_path: Path) -> None:
    for name in (shards(hub)[2].name, "config.json"):
        into = tmp_path / f"without-{name}"
        hub.corrupt = {name}
        done = run(hub, into)
        assert done.returncode == 1
        assert "CHECKSUM_WRONG" in done.stderr
        assert not (into / name).exists()
        assert not (into / MARK).exists()
        hub.corrupt = set()
        assert run(hub, into).returncode == 0


def test_a_file_that_changed_on_the_volume_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    into = tmp_path / "tiny"
    assert run(hub, into).returncode == 0
    damaged = into / shards(hub)[0].name
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    first, second = run(hub, into), run(hub, into)
    assert 0 in (first.returncode, second.returncode)
    assert damaged.read_bytes() == shards(hub)[0].read_bytes()


def test_another_model_or_commit_in_the_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    into = tmp_path / "tiny"
    assert run(hub, into).returncode == 0
    hub.commit = "f" * 40
    done = run(hub, into)
    assert done.returncode == 2
    assert COMMIT in done.stderr
    assert "FOLDER_HOLDS_OTHER_MODEL" in done.stderr


def test_a_full_disk_is_named(hub: Hub, tmp_path: Path) -> None:
    into = tmp_path / "tiny"
    into.mkdir()
    (into / f"{shards(hub)[0].name}.part").symlink_to("/dev/full")
    done = run(hub, into)
    assert done.returncode == 1
    assert "DISK_FULL" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_and_a_bad_volume_are_named(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "x", "--model", "org/nothing")
    assert done.returncode == 1
    assert "org/nothing" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(hub, Path("/proc/nothing"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
