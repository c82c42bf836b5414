"""`stageline batch` against gateway processes that are killed: every line exactly once, whatever stands in it."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_nursery import ToyGateway

from gateway.cli import main
from gateway.cli.batch_job import BatchClient
from gateway.cli.connection import Connection


@pytest.fixture
def server(children, state_url) -> Iterator[ToyGateway]:
    """With batches, whose state outlives it."""
    with children.toy_gateway(state_url=state_url) as server:
        yield server


def flags(server: ToyGateway) -> list[str]:
    return ["--address", server.address]


def line(custom_id: object, **changes) -> str:
    number = int(str(custom_id).split("-")[-1]) if str(custom_id)[-1].isdigit() else 0
    body = {"model": "toy", "prompt": [number % 50 + 1, 7, number // 50 + 1], "max_tokens": 6, "temperature": 0}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | changes)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    code = main(["batch", *map(str, arguments), "--output", "json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else {}, printed.err


def records(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_good_and_bad_lines(server, tmp_path, capsys) -> None:
    good = [line(f"r-{i}") for i in range(40)]
    bad = [
        "this is not JSON", "[1, 2]", '{"custom_id": "half', line("x-1", method="GET"), line("x-2", url="/v1/embeddings"),
        line("x-3", body={"model": "toy", "prompt": [5], "max_tokens": 0}), line("x-4", body={"model": "other", "prompt": "a"}),
        line("x-5", body={"model": "toy", "prompt": [5], "stream": True}), line(7),
        json.dumps({"custom_id": "x-6", "method": "POST"}), line("x-7", body={"model": "toy", "prompt": [5], "nonsense": 1}),
    ]  # fmt: skip
    lines = good[:20] + bad + ["", "   "] + good[20:]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    code, batch, _ = run(capsys, "submit", source, "--output-file", out, "--wait", *flags(server))
    assert code == 0
    assert (batch["object"], batch["status"], batch["endpoint"]) == ("batch", "completed", "/v1/completions")
    assert batch["request_counts"] == {"total": 51, "completed": 40, "failed": 11}
    answers, errors = records(out), records(tmp_path / "out.errors.jsonl")
    assert [answer["custom_id"] for answer in answers] == [f"r-{i}" for i in range(40)]
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert body["object"] == "text_completion"
        assert body["usage"]["completion_tokens"] == 6
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in answers}) > 20
    codes = [(e["error"] or e["response"]["body"]["error"])["code"] for e in errors]
    assert codes == [
        "line_not_json", "line_not_object", "line_not_json", "method_wrong", "url_unknown", "max_tokens_out_of_range",
        "model_not_found", "stream_in_batch", "custom_id_invalid", "field_missing", "unknown_parameter",
    ]  # fmt: skip
    assert errors[0]["error"]["line"] == 21
    # The same command again is the same batch, and nothing runs again.
    out.unlink()
    code, again, _ = run(capsys, "submit", source, "--output-file", out, *flags(server))
    assert (code, again) == (0, batch)
    assert records(out) == answers
    # Another output file is another batch.
    code, other, _ = run(capsys, "submit", source, "--output-file", tmp_path / "b.jsonl", "--wait", *flags(server))
    assert other["id"] != batch["id"]
    code, listed, _ = run(capsys, "list", *flags(server))
    assert [one["id"] for one in listed["data"]] == [other["id"], batch["id"]]
    code, got, _ = run(capsys, "get", batch["id"], *flags(server))
    assert got == batch
    assert main(["batch", "delete", other["id"], *flags(server)]) == 0
    assert [one["id"] for one in run(capsys, "list", *flags(server))[1]["data"]] == [batch["id"]]


def test_an_upload_whose_last_call_meets_a_new_server_begins_again(server, tmp_path, monkeypatch) -> None:
    source = write(tmp_path / "in.jsonl", [line("r-1")])
    with BatchClient(Connection(server.address)) as client:
        complete, calls = client._stub.CompleteFile, []

        def cut(request, **how):
            calls.append(request.file_id)
            if len(calls) == 1:
                server.kill()
                server.start()
            return complete(request, **how)

        monkeypatch.setattr(client._stub, "CompleteFile", cut)
        file_id, _ = client.upload(source, lambda text: None)
        assert calls[-1] == file_id != calls[0]
        assert client.create(file_id, "key", 0, {}).total == 1


def test_kills_lose_and_repeat_no_line(server, state_url, tmp_path, capsys) -> None:
    # Fewer with PostgreSQL: it is killed together with the gateway in test_batch_state.
    number, least = (900, 3) if state_url.startswith("sqlite") else (300, 2)
    source, out = write(tmp_path / "in.jsonl", [line(f"r-{i}") for i in range(number)]), tmp_path / "out.jsonl"
    done, kills, draw = threading.Event(), 0, random.Random(5)

    def trouble() -> None:
        nonlocal kills
        while kills < 6 and not done.wait(draw.uniform(0.3, 1.0)):
            server.kill()
            kills += 1
            done.wait(draw.uniform(0, 0.3))
            server.start()

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        code, batch, err = run(capsys, "submit", source, "--output-file", out, "--wait", *flags(server))
    finally:
        done.set()
        thread.join()
    assert code == 0, err
    assert kills >= least
    assert batch["request_counts"] == {"total": number, "completed": number, "failed": 0}
    answers = records(out)
    assert [answer["custom_id"] for answer in answers] == [f"r-{i}" for i in range(number)]
    # What was computed around the kills is what an undisturbed server computes.
    code, _, _ = run(capsys, "submit", source, "--output-file", tmp_path / "calm.jsonl", "--wait", *flags(server))
    texts, calm = (
        [answer["response"]["body"]["choices"][0]["text"] for answer in records(path)]
        for path in (out, tmp_path / "calm.jsonl")
    )
    assert texts == calm


def test_cancel(server, tmp_path, capsys) -> None:
    source, out = write(tmp_path / "in.jsonl", [line(f"r-{i}") for i in range(3000)]), tmp_path / "out.jsonl"
    code, batch, _ = run(capsys, "submit", source, "--output-file", out, *flags(server))
    assert (code, batch["status"]) == (0, "in_progress")
    assert not out.exists()
    while not run(capsys, "get", batch["id"], *flags(server))[1]["request_counts"]["completed"]:
        time.sleep(0.02)
    code, cancelling, _ = run(capsys, "cancel", batch["id"], *flags(server))
    assert (code, cancelling["status"]) in ((0, "cancelling"), (0, "cancelled"))
    while (now := run(capsys, "get", batch["id"], *flags(server))[1])["status"] != "cancelled":
        time.sleep(0.02)
    code, final, _ = run(capsys, "submit", source, "--output-file", out, "--wait", *flags(server))
    assert (code, final["status"]) == (1, "cancelled")
    assert 0 < len(records(out)) == now["request_counts"]["completed"] < 3000


def test_an_input_that_changes_while_its_batch_runs(server, tmp_path, capsys) -> None:
    lines = [line(f"r-{i}") for i in range(2000)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    _, batch, _ = run(capsys, "submit", source, "--output-file", out, *flags(server))
    write(source, lines[:-1])
    code, _, err = run(capsys, "submit", source, "--output-file", out, *flags(server))
    assert code == 2
    assert batch["id"] in err
    assert "INPUT_CHANGED" in err
    assert main(["batch", "cancel", batch["id"], *flags(server)]) == 0


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "INPUT_EMPTY"),
        (["", " "], "INPUT_EMPTY"),
        ([line("same-1"), line("b-2"), line("same-1")], "CUSTOM_ID_DUPLICATE"),
    ],
)
def test_inputs_refused_as_a_whole(lines, reason, server, tmp_path, capsys) -> None:
    source = write(tmp_path / "in.jsonl", lines)
    code, _, err = run(capsys, "submit", source, "--output-file", tmp_path / "out.jsonl", "--wait", *flags(server))
    assert code == 2
    assert reason in err
    assert "Traceback" not in err
    if reason == "CUSTOM_ID_DUPLICATE":
        assert "'same-1' in lines 1 and 3" in err


def test_wrong_commands(server, tmp_path, capsys) -> None:
    source, out = write(tmp_path / "in.jsonl", [line("a-1")]), tmp_path / "out.jsonl"
    for arguments, reason, expected in (
        (("submit", tmp_path / "none.jsonl", "--output-file", out), "INPUT_UNREADABLE", 2),
        (("submit", source, "--output-file", source), "OUTPUT_IS_INPUT", 2),
        (("submit", source, "--output-file", tmp_path / "no" / "out.jsonl"), "OUTPUT_NOT_WRITABLE", 2),
        (("get", "batch_none"), "BATCH_NOT_FOUND", 1),
        (("cancel", "batch_none"), "BATCH_NOT_FOUND", 1),
        (("delete", "batch_none"), "BATCH_NOT_FOUND", 1),
        (("list", "--limit", "0"), "CONFIG_INVALID", 2),
    ):
        code, _, err = run(capsys, *arguments, *flags(server))
        assert (code, reason in err, "Traceback" in err) == (expected, True, False), err
    code, _, err = run(capsys, "list", "--address", "127.0.0.1:1")
    assert code == 1
    assert "does not answer" in err
