"""What benchmarks/calibrate.py measures, of stages in processes of their own whose steps take a known time."""

from __future__ import annotations

from engine_helpers import NUM_LAYERS
from process_nursery import Nursery

from benchmarks import calibrate
from gateway.bench.load import Shape

DELAY_S, STREAMS = 0.01, 4


async def test_figures_of_a_server_whose_steps_take_a_known_time(children: Nursery, monkeypatch) -> None:
    shapes = {"DECODE": Shape(4, 32), "THROUGHPUT": Shape(4, 8), "FIRST": Shape(8, 2)}  # short ones, for a quick test
    for name, shape in shapes.items():
        monkeypatch.setattr(calibrate, name, shape)
    stages = [children.stage(*layers, num_blocks=128, delay_s=DELAY_S) for layers in ((0, 2), (2, NUM_LAYERS))]
    address = children.gateway(stages, settings={})["grpc"]
    found = await calibrate.measure(address, STREAMS, repeats=1, rounds=4)
    # Two stages take a step each DELAY_S at best: half of the streams in each of two micro-batches, or all in one in turn.
    most = STREAMS / (2 * DELAY_S)
    assert 0.02 * most < found["decode_tokens_per_s"] <= 1.05 * most
    assert 0.01 * most < found["output_tokens_per_s"] <= 1.05 * most
    assert 1000 * 2 * DELAY_S <= found["ttft_ms"] < 20_000
    assert found["kv_tokens"] == 128 * calibrate.BLOCK
    assert 20 < found["memory_mib"] < 2000
