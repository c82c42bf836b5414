"""The figures of `stageline bench` from known times, and its transport over real sockets."""

from __future__ import annotations

import pytest

from gateway.bench.load import Outcome, Shape
from gateway.bench.measure import checked, latency, percentiles, throughput
from gateway.bench.transport import transport
from gateway.cli import main
from stageline.errors import UnavailableError
from tests.certificates import Authority

SHAPE = Shape(prompt_tokens=100, new_tokens=5)


class Clockwork:
    """A server that needs 0.5 s to the first token and 0.1 s for each later one."""

    async def run(self, shape: Shape) -> Outcome:
        return Outcome(shape, 10.0, [10.5 + 0.1 * i for i in range(shape.new_tokens)])

    async def closed_loop(self, shapes, num_streams: int) -> list[Outcome]:
        return [await self.run(shape) for shape in shapes]


async def test_latency_of_a_known_server() -> None:
    figures = await latency(Clockwork(), SHAPE, 3)
    assert figures["ttft_ms"] == pytest.approx(500)
    assert figures["prefill_tokens_per_s"] == pytest.approx(200)
    assert figures["decode_tokens_per_s"] == pytest.approx(10)
    assert figures["itl_ms"]["p99"] == pytest.approx(100)


async def test_throughput_counts_what_came_while_all_decode() -> None:
    figures = await throughput(Clockwork(), SHAPE, 8, 2)
    assert figures["decode_tokens_per_s"] == pytest.approx(80)
    assert figures["output_tokens_per_s"] == pytest.approx(8 * 5 / 0.9, rel=1e-3)


def test_a_failed_or_short_request_is_no_figure() -> None:
    with pytest.raises(UnavailableError, match="4 of 5 tokens"):
        checked([Outcome(SHAPE, 0.0, [1.0] * 4)])
    with pytest.raises(UnavailableError, match="QUEUE"):
        checked([Outcome(SHAPE, 0.0, [1.0] * 5, error="QUEUE")])


def test_percentiles() -> None:
    assert percentiles([i / 1000 for i in range(1, 101)]) == {"p50": 51.0, "p90": 91.0, "p99": 100.0}


@pytest.mark.parametrize("secure", [False, True])
async def test_transport_moves_the_bytes(tmp_path, secure: bool) -> None:
    figures = await transport(3 << 20, 1, Authority("stages").issue(tmp_path / "tls") if secure else None)
    ways = {"frames", "shared", "message", "socket", "copy"} | ({"frames_tls"} if secure else set())
    assert set(figures["gigabytes_per_s"]) == ways
    assert all(rate > 0 for rate in figures["gigabytes_per_s"].values())


def test_wrong_flags_are_named(capsys) -> None:
    assert main(["bench", "latency", "--streams", "0"]) == 2
    assert "--streams" in capsys.readouterr().err
