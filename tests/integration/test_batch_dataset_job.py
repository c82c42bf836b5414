"""The dataset job on a real Ray, against a real server: whatever is killed, every custom_id has one result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from process_nursery import ToyGateway

from gateway.batch.dataset.journal import ShardJournal
from gateway.batch.dataset.storage import Place
from tests.ray_environment import RAY_ENVIRONMENT

HEAD = """
import sys, ray
for attempt in range(5):
    try:
        ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=100_000_000, log_to_driver=False)
        break
    except Exception:  # Ray gives its raylet 30 s, which is not enough where the machine has other work
        ray.shutdown()
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
CONCURRENCY = 16
pytestmark = pytest.mark.timeout(600)


@dataclass
class Cluster:
    """`env`: of a job on it; a RayJob's entrypoint finds its cluster by the same variable."""

    env: dict[str, str]
    head_pid: int

    def runners(self) -> list[psutil.Process]:
        """Ray Data's actors of this cluster alone."""
        found = []
        for process in psutil.Process(self.head_pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "MapWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    """One for the module."""
    env = {**os.environ, **RAY_ENVIRONMENT}
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=env,
    )  # fmt: skip
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = head.stdout.readline().strip()
        assert address, "Ray did not start"
        yield Cluster({**env, "RAY_ADDRESS": address}, head.pid)
    finally:
        head.stdin.close()  # the head's process ends, and with it everything that Ray started
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            head.kill()


@pytest.fixture(scope="module")
def server(children) -> Iterator[ToyGateway]:
    with children.toy_gateway(http_port=0) as running:
        yield running


def fields(number: int, **changes: object) -> dict:
    body = {"model": "toy", "prompt": [number % 50 + 1, 7, number // 50 + 1], "max_tokens": 6, "temperature": 0}
    return {"custom_id": f"r-{number}", "method": "POST", "url": "/v1/completions", "body": body} | changes


class Job:
    """One command; `run` may be repeated."""

    def __init__(self, env: dict[str, str], server: ToyGateway, given: Path, output: Path) -> None:
        self._env = env
        self.output, self.errors = output, output.with_name(f"{output.stem}.errors.jsonl")
        self.state = output.with_name(f"{output.name}.stageline")
        self._command = [
            sys.executable, "-m", "gateway.batch.dataset", str(given), "--output-file", str(output), "--address",
            server.http, "--concurrency", str(CONCURRENCY),
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self) -> tuple[int, str, str]:
        process = self.start()
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def durable(self) -> int:
        """Requests that have a record on the disk."""
        shards = self.state / "shards"
        done = [path.stem.split("-")[1:] for path in shards.glob("*.done")]
        parts = [path.name for path in shards.glob("*") if path.is_dir()] if shards.exists() else []
        count = sum(int(completed) + int(failed) for completed, failed in done)
        return count + sum(len(ShardJournal(Place(str(shards)), int(name)).finished()) for name in parts)

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)


def answered(server: ToyGateway) -> int:
    """Requests that the server has finished since it started."""
    lines = httpx.get(f"{server.http}/metrics", timeout=60).text.splitlines()
    return sum(int(float(one.split()[-1])) for one in lines if one.startswith("stageline:request_success_total"))


def records(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_job_that_is_killed_goes_on_where_it_was(ray_cluster, server, tmp_path) -> None:
    lines = [json.dumps(fields(number)) for number in range(1200)]
    lines[5:5] = ["this is not JSON", "", json.dumps(fields(9000, url="/v1/embeddings")),
                  json.dumps(fields(9001, body={"model": "other", "prompt": "a"})),
                  json.dumps(fields(9002, body={"model": "toy", "prompt": "a", "stream": True}))]  # fmt: skip
    given = tmp_path / "in.jsonl"
    given.write_text("\n".join(lines) + "\n")
    job = Job(ray_cluster.env, server, given, tmp_path / "out.jsonl")
    before = answered(server)
    process = job.start()
    job.wait_until(lambda: job.durable() >= 300, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = job.durable()
    assert kept < 1204, "it ended before it could be killed"
    assert not job.output.exists()

    given.write_text("\n".join(lines[:-1]) + "\n")  # another input is no continuation
    code, _, err = job.run()
    assert (code, "INPUT_CHANGED" in err) == (2, True), err
    given.write_text("\n".join(lines) + "\n")

    code, out, err = job.run()
    assert code == 0, err
    assert "1200 answers" in out
    answers, errors = records(job.output), records(job.errors)
    assert [one["custom_id"] for one in answers] == [f"r-{number}" for number in range(1200)]
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 6 for one in answers)
    codes = [(one["error"] or one["response"]["body"]["error"])["code"] for one in errors]
    assert codes == ["line_not_json", "url_unknown", "model_not_found", "stream_in_batch"]
    assert [one["error"]["line"] for one in errors if one["error"]] == [6, 8]
    # What was durable did not run again. What ran, or ended within the last half second, did.
    again = answered(server) - before - 1200
    assert 0 <= again < 300 <= kept
    assert not (job.state / "shards").exists()

    asked = answered(server)
    code, out, err = job.run()
    assert (code, "1200 answers" in out) == (0, True), err
    assert answered(server) == asked


def test_parquet_while_runners_and_the_server_die(ray_cluster, server, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for place, numbers in enumerate((range(700), range(700, 1100))):
        rows = [fields(number) for number in numbers]
        rows = [{**row, "body": json.dumps(row["body"])} if place else row for row in rows]  # text, and structs
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{place}.parquet", row_group_size=500)
    job = Job(ray_cluster.env, server, folder, tmp_path / "out.parquet")
    process = job.start()
    job.wait_until(lambda: job.durable() >= 100, process)
    runners = ray_cluster.runners()
    assert runners
    for runner in runners:
        runner.kill()
    durable = job.durable()
    job.wait_until(lambda: job.durable() >= min(durable + 100, 1000), process)
    server.kill()
    time.sleep(0.5)
    server.start()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "1100 answers" in out
    table = pyarrow.parquet.read_table(job.output)
    assert table.column_names == ["id", "custom_id", "status_code", "request_id", "body"]
    assert table["custom_id"].to_pylist() == [f"r-{number}" for number in range(1100)]
    assert set(table["status_code"].to_pylist()) == {200}
    texts = [json.loads(body)["choices"][0]["text"] for body in table["body"].to_pylist()]
    assert len(set(texts)) > 100
    assert job.errors.read_text() == ""


def test_a_custom_id_that_stands_twice_is_refused_by_name(ray_cluster, server, tmp_path) -> None:
    for name, numbers in (("a", range(40)), ("b", range(39, 60))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(fields(number)) for number in numbers))
    job = Job(ray_cluster.env, server, tmp_path, tmp_path / "out" / "out.jsonl")
    code, out, err = job.run()
    assert (code, out) == (2, "")
    assert "'r-39' in a.jsonl line 40 and b.jsonl line 1" in err
    assert not job.output.exists()
