"""Progress of a start on stderr: bars on a terminal, a few whole lines anywhere else.

Bars redraw their line, so nothing else may write to the terminal meanwhile: while a `Progress` is open, `sys.stderr` is
a file that puts its lines above the bars.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

POLL_S = 0.2
LINE_EVERY_S = 10.0  # between two lines about the same thing, where there are no bars
BYTES_FORMAT = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}]"

# Name of what loads → (bytes done, bytes in all).
Loads = Mapping[str, tuple[int, int]]


class Progress:
    """Follows `read` on a thread, from `with` to its end. `read` may raise: then nothing is known at that moment."""

    def __init__(
        self, read: Callable[[], Loads], file: TextIO | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        """`say` takes whole lines instead of `file`, a terminal or not."""
        self._read, self._file = read, file or sys.stderr
        self._bars = say is None and self._file.isatty()
        self._painter: _Bars | _Lines = _Bars(self._file) if self._bars else _Lines(say or self._print)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._waiting_for: str | None = None

    def wait_for(self, what: str) -> None:
        """From now on everything waits for `what`."""
        self._waiting_for = what

    def __enter__(self) -> Progress:
        self._before = sys.stderr
        if self._bars:
            sys.stderr = DummyTqdmFile(self._file)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._painter.close()
        sys.stderr = self._before

    def _print(self, line: str) -> None:
        print(f"stageline: {line}", file=self._file, flush=True)

    def _follow(self) -> None:
        while True:
            last = self._ended.wait(POLL_S)
            try:
                loads: Loads = self._read()
            except Exception:  # the cluster is not up yet, or goes down
                loads = {}
            self._painter.paint(loads, self._waiting_for)
            if last:
                return


class _Bars:
    """One bar for each thing that loads, and one line that says what is waited for."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._bars: dict[str, Any] = {}
        self._wait: Any = None

    def paint(self, loads: Loads, waiting_for: str | None) -> None:
        for name, bar in self._bars.items():
            if name not in loads and bar.n < bar.total:  # what is no longer reported has loaded
                bar.update(bar.total - bar.n)
        for name, (done, total) in sorted(loads.items()):
            if name not in self._bars:
                self._bars[name] = tqdm(
                    desc=name, total=total, unit="B", unit_scale=True, file=self._file, bar_format=BYTES_FORMAT
                )
            self._bars[name].update(done - self._bars[name].n)
        if waiting_for is not None:
            if self._wait is None:
                self._wait = tqdm(desc=f"waiting for {waiting_for}", file=self._file, bar_format="{desc} {elapsed}")
            self._wait.refresh()

    def close(self) -> None:
        for bar in [*self._bars.values(), *([] if self._wait is None else [self._wait])]:
            bar.close()


class _Lines:
    """A line when something begins and ends, and one now and then in between."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen: dict[str, tuple[int, int]] = {}
        self._loaded: set[str] = set()
        self._spoken_s: dict[str, float] = {}

    def paint(self, loads: Loads, waiting_for: str | None) -> None:
        for name, (done, total) in sorted(loads.items()):
            self._seen[name] = (done, total)
            if done < total:
                self._say(name, f"{name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB loaded")
        for name, (done, total) in self._seen.items():
            if name not in self._loaded and (done == total or name not in loads):
                self._loaded.add(name)
                self._write(f"{name}: {total / 1e6:.0f} MB loaded")
        if waiting_for is not None:
            self._say("", f"waiting for {waiting_for}")

    def close(self) -> None:
        """Nothing to do."""

    def _say(self, about: str, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._spoken_s.get(about, -LINE_EVERY_S) >= LINE_EVERY_S:
            self._spoken_s[about] = now_s
            self._write(line)
