"""Pure parts of the dataset job, and its files: shards, duplicates, what to do next, journals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gateway.batch.dataset import shards as sharding
from gateway.batch.dataset.command import main
from gateway.batch.dataset.journal import Record, ShardJournal, done_shards, read_done
from gateway.batch.dataset.names import error_file
from gateway.batch.dataset.plan import duplicates, fingerprint_of, from_json, new_plan, next_step, to_json
from gateway.batch.dataset.shards import cut, read, scan, with_scans
from gateway.batch.dataset.storage import Place, expand
from gateway.batch.lines import LineProblem, LineRequest
from stageline.errors import ConfigError


def line(custom_id: object, **changes: object) -> bytes:
    body = {"model": "toy", "prompt": "x" * (len(str(custom_id)) * 7 % 40)}
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | changes
    ).encode()


def rows_of(path: Path):
    cuts = cut(expand(str(path)))
    scanned = with_scans(cuts, [scan(shard) for shard in cuts])
    return scanned, [row for shard in scanned for row in read(shard)]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("seed", range(6))
def test_every_line_is_in_one_shard_whatever_the_cut(tmp_path: Path, monkeypatch, seed: int, end: bytes) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(sharding, "MIN_SHARD_BYTES", draw.choice([1, 7, 60, 300, 5000]))
    lines = [draw.choice([line(f"r-{i}"), b"", b"  \r", b"no json", line(f"\xe9-{i}\u2028")]) for i in range(60)]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + end)
    scanned, rows = rows_of(path)
    wanted = [number for number, text in enumerate(lines, 1) if text.strip() or number == 1]
    assert [number for number, _ in rows] == wanted
    for number, what in rows:
        if lines[number - 1].startswith(b"{"):
            assert isinstance(what, LineRequest)
            assert what.custom_id == json.loads(lines[number - 1])["custom_id"]
        else:
            assert isinstance(what, LineProblem)
            assert what.error.message.startswith(f"line {number} ")
    assert sum(shard.num_requests for shard in scanned) == len(wanted)
    before = 0
    for shard in scanned:
        assert shard.requests_before == before
        before += shard.num_requests


def test_a_line_that_is_too_long_is_an_error_and_the_rest_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sharding, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(sharding, "MIN_SHARD_BYTES", 150)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([line("a"), line("b", body={"model": "x" * 5000}), line("c"), b"y" * 900]))
    _, rows = rows_of(path)
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert [getattr(what, "custom_id", None) for _, what in rows] == ["a", None, "c", None]
    assert [what.error.reason for _, what in rows if isinstance(what, LineProblem)] == ["LINE_TOO_LONG"] * 2


def test_parquet_of_text_and_of_structs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sharding, "SHARD_ROWS", 7)
    bodies = [{"model": "toy", "prompt": f"p{i}"} | ({"max_tokens": i} if i % 2 else {}) for i in range(50)]
    ids, urls = [f"r-{i}" for i in range(50)], ["/v1/completions"] * 50
    texts = [json.dumps(body) for body in bodies]
    texts[3] = "{half"
    for name, column in (("text", texts), ("struct", bodies)):
        path = tmp_path / f"{name}.parquet"
        table = pyarrow.table({"custom_id": ids, "url": urls, "body": column, "more": ids})
        pyarrow.parquet.write_table(table, path, row_group_size=20)
        scanned, rows = rows_of(path)
        assert [shard.num_requests for shard in scanned] == [7, 7, 6, 7, 7, 6, 7, 3]
        assert [number for number, _ in rows] == list(range(1, 51))
        for (_, what), body in zip(rows, bodies, strict=True):
            if isinstance(what, LineProblem):
                assert (what.custom_id, what.error.reason, name) == ("r-3", "BODY_INVALID", "text")
            else:
                assert what.body == body  # fields that other rows have are left out, not null
    pyarrow.parquet.write_table(pyarrow.table({"custom_id": ids}), tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match="lacks the columns url, body"):
        cut(expand(str(tmp_path / "bad.parquet")))
    (tmp_path / "none.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match="cannot read"):
        cut(expand(str(tmp_path / "none.parquet")))


def test_an_input_that_changes_after_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line("a") + b"\n")
    scanned, _ = rows_of(path)
    path.write_bytes(line("b") + b"\n")
    with pytest.raises(ConfigError, match="changed"):
        read(scanned[0])


def test_duplicates_are_counted_and_placed() -> None:
    draw = random.Random(3)
    for _ in range(50):
        names = [draw.randrange(30) for _ in range(draw.randrange(40))]
        ids = [b"%016d" % name for name in names]
        cut_at = draw.randrange(len(ids) + 1)
        wanted = [(names.index(name), place) for place, name in enumerate(names) if names.index(name) < place]
        count, places = duplicates([b"".join(ids[:cut_at]), b"", b"".join(ids[cut_at:])], 5)
        assert (count, places) == (len(wanted), wanted[:5])


def test_what_to_do_next(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line("a"))
    files = tuple(expand(str(path)))
    scanned, _ = rows_of(path)
    plan = new_plan(files, scanned)
    assert from_json(to_json(plan), "x") == plan
    same, others = plan.fingerprint, (*files, ("file:///other", 1, "1"))
    assert fingerprint_of(scanned) == same
    assert next_step(None, files, None, results_exist=False) == "scan"
    assert next_step(None, files, same, results_exist=False) == "begin"
    assert next_step(plan, files, None, results_exist=False) == "resume"
    assert next_step(plan, others, None, results_exist=False) == "scan"
    assert next_step(plan, others, same, results_exist=False) == "resume"  # written again, with the same content
    with pytest.raises(ConfigError, match="another --output-file"):
        next_step(plan, others, "another", results_exist=False)
    ended = from_json(to_json(plan).replace(b'"ended": false', b'"ended": true'), "x")
    assert next_step(ended, files, None, results_exist=True) == "done"
    assert next_step(ended, files, None, results_exist=False) == "scan"
    assert next_step(ended, others, "another", results_exist=True) == "begin"
    for data in (b"", b"{}", b'{"version": 99}', b"[1]"):
        with pytest.raises(ConfigError):
            from_json(data, "x")


def test_a_journal_keeps_the_first_of_two_records_and_no_torn_file(tmp_path: Path) -> None:
    folder = Place(str(tmp_path))
    first, second = ShardJournal(folder, 3), ShardJournal(folder, 3)
    first.add({1: Record(True, b'{"a": 1}\n'), 2: Record(False, b'{"b": 2}\n')})
    second.add({2: Record(True, b'{"other": 2}\n'), 3: Record(True, b'{"c": 3}\n')})
    (tmp_path / "000003" / "ffffffff-000000.1234.tmp").write_bytes(b"4 1 half a rec")
    found = ShardJournal(folder, 3).finished()
    assert found.keys() == {1, 2, 3}
    assert found == ShardJournal(folder, 3).finished()
    second.finish(found)
    assert not (tmp_path / "000003").exists()
    [(index, (name, completed, failed))] = done_shards(folder).items()
    assert (index, completed + failed) == (3, 3)
    assert read_done(folder, name) == sorted(found.items())


def test_the_places_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    names = [url.rpartition(tmp_path.name)[2] for url, *_ in expand(str(tmp_path))]
    assert names == ["/a.jsonl", "/b.jsonl", "/sub/c.parquet"]
    assert len(expand(f"{tmp_path}/*.jsonl")) == 2
    assert len(expand(f"{tmp_path}/*.jsonl", without=[Place(f"{tmp_path}/b.jsonl"), Place("s3://other/a.jsonl")])) == 1
    assert len(expand(f"file://{tmp_path}/a.jsonl")) == 1
    for url, says in (
        (f"{tmp_path}/no", "no such"),
        (f"{tmp_path}/notes.txt", "ends with"),
        ("nonsense://x", "expected"),
    ):
        with pytest.raises(ConfigError, match=says):
            expand(url)
    assert error_file("s3://b/out.parquet") == "s3://b/out.errors.jsonl"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "f"))
    place.write(b"old")

    def half() -> None:
        with place.writing() as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert place.read() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    (tmp_path / "locked").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write"):
        Place(str(tmp_path / "locked" / "f")).write(b"")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "required"),
        (("in.jsonl", "--output-file", "out.csv", "--address", "http://127.0.0.1:1"), "out.csv"),
        (("in.jsonl", "--output-file", "in.jsonl", "--address", "http://127.0.0.1:1"), "three files"),
        (("in.jsonl", "--output-file", "o.jsonl", "--address", "127.0.0.1:1"), "http://HOST:PORT"),
        (("in.jsonl", "--output-file", "o.jsonl", "--address", "http://127.0.0.1:1", "--workers", "0"), "--workers"),
        (("in.jsonl", "--output-file", "o.jsonl", "--address", "http://127.0.0.1:1", "--ca-file", "/no"), "/no"),
    ],
)
def test_a_wrong_command_is_a_sentence_and_2(capsys, args: tuple[str, ...], says: str) -> None:
    try:
        code = main(args)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err


def test_no_server(capsys) -> None:
    args = ("in.jsonl", "--output-file", "o.jsonl", "--address", "http://127.0.0.1:1", "--give-up-s", "0.2")
    assert main(args) == 1
    assert "no Stageline server answers at http://127.0.0.1:1" in capsys.readouterr().err
