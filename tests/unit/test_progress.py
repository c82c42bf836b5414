"""What a start writes on stderr: whole lines into a file, bars that nothing tears on a terminal."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from gateway.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Loads:
    """Answers prepared answers in turn; `done` is set when the last one has been read."""

    def __init__(self, *answers) -> None:
        self._answers, self.done = list(answers), threading.Event()

    def __call__(self):
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if len(self._answers) == 1:
            self.done.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


def follow(file: io.StringIO, *answers, during: str = "") -> str:
    loads = Loads(*answers)
    with Progress(loads, file) as progress:
        assert loads.done.wait(10)
        if during:
            print(during, file=sys.stderr)
        progress.wait_for("a pipeline")
    return file.getvalue()


def test_lines_where_there_is_no_terminal():
    text = follow(
        io.StringIO(),
        RuntimeError("no cluster yet"),
        {"stage 0": (0, 200_000_000)},
        {"stage 0": (100_000_000, 200_000_000), "stage 1": (100_000_000, 100_000_000)},
        {"stage 0": (200_000_000, 200_000_000)},
        {},
    )
    assert text.splitlines() == [
        "stageline: stage 0: 0 of 200 MB loaded",
        "stageline: stage 1: 100 MB loaded",
        "stageline: stage 0: 200 MB loaded",
        "stageline: waiting for a pipeline",
    ]


def test_bars_on_a_terminal_and_lines_above_them():
    text = follow(Terminal(), {"stage 0": (0, 2000)}, {"stage 0": (1000, 2000)}, {}, during="a line of a log")
    assert "stage 0 100%" in text.replace("  ", " ")
    assert "waiting for a pipeline 00:0" in text
    written = [part for part in text.replace("\r", "\n").split("\n") if "a line of a log" in part]
    assert [part.replace("\x1b[A", "").strip() for part in written] == ["a line of a log"]


def test_stderr_is_given_back():
    before = sys.stderr
    with pytest.raises(ZeroDivisionError), Progress(dict, Terminal()):
        raise ZeroDivisionError
    assert sys.stderr is before
