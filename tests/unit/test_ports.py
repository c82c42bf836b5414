"""Free ports: outside the kernel's own range where there is room, and free."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gateway.cli import ports


def test_a_port_is_not_one_that_connections_get() -> None:
    lowest = int(ports.EPHEMERAL.read_text().split()[0])
    assert 20_000 <= ports.free_port("127.0.0.1") < lowest


def test_a_port_in_use_or_to_avoid_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ports.free_port("127.0.0.1")
    monkeypatch.setattr(ports, "FIRST", wanted)
    monkeypatch.setattr(ports, "LAST", wanted)
    assert ports.free_port("127.0.0.1") == wanted
    assert ports.free_port("127.0.0.1", avoid=[wanted]) != wanted
    with socket.create_server(("127.0.0.1", wanted)):
        assert ports.free_port("127.0.0.1") != wanted


def test_where_the_kernel_gives_all_ports_by_itself_it_gives_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "EPHEMERAL", everything)
    with socket.create_server(("127.0.0.1", ports.free_port("127.0.0.1"))):
        pass


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        ports.free_port("192.0.2.1")
