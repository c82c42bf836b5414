"""What benchmarks/calibrate.py compares runs with, from a profile whose times are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.calibrate import DECODE, FIRST, KV_BYTES, NAME, Setup
from gateway.planner.catalogue import find_model_config, read_profile
from gateway.planner.cost import Link, Workload, activation_bytes
from gateway.simulator import GatewayCost

LAYER_S, TOKEN_S, HEAD_S = 0.001, 0.0001, 0.004
FREE = GatewayCost(request_s=0, step_s=0, row_s=0)


def setup(tmp_path: Path, cores: int, busy: float) -> Setup:
    """Times of a layer are LAYER_S + TOKEN_S for each token, `busy` times as long while all cores compute."""

    def tables(factor: float) -> dict[str, object]:
        return {
            "layer_s": {size: factor * (LAYER_S + TOKEN_S * size) for size in (1, 1000)},
            "head_s": dict.fromkeys((1, 1000), factor * HEAD_S),
        }

    device = {
        "memory_mib": 1000, "memory_gb_per_s": 1, "bf16_tflops": 1, "reserve_mib": 200, "measured": tables(1.0),
        "host": {"cores": cores, "busy": tables(busy)},
    }  # fmt: skip
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump({"gpus": {NAME: device}}))
    no_network = Link(bytes_per_s=1e18, latency_s=0.0, software_bytes_per_s=1e18)
    return Setup(
        model="m", config=find_model_config("qwen2-0.5b"), dtype="float32", gpu=read_profile(str(file))[NAME],
        link=no_network, cost=FREE,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "cores", "busy"), [(1, 2, 1.5), (2, 2, 1.5), (4, 2, 1.5), (4, 1, 1.0)])
def test_predictions_are_those_of_a_host_that_shares_its_cores(tmp_path: Path, count, cores, busy) -> None:
    streams = 8
    found = setup(tmp_path, cores, busy).predict(count, streams)
    rows = streams // count
    ring_s = 24 * (LAYER_S + TOKEN_S * rows) + HEAD_S  # of a micro-batch through all stages, alone
    computing = min(count, cores)
    most = rows * computing / (ring_s * (busy if computing > 1 else 1.0))
    # The longest stage is a little longer than the others, which matters where each has a core.
    assert most == pytest.approx(found["decode_tokens_per_s"], rel=0.12 if count == cores else 1e-6)
    prompt_s = 24 * (LAYER_S + TOKEN_S * FIRST.prompt_tokens) + HEAD_S
    assert 0.4 * prompt_s < found["ttft_ms"] / 1e3 < 1.6 * prompt_s
    if count == 1:
        assert found["ttft_ms"] / 1e3 == pytest.approx(prompt_s, rel=0.01)
    assert found["kv_tokens"] == pytest.approx(KV_BYTES / (2 * 24 / count * 2 * 64 * 4), rel=0.25)
    weights = (494e6 + 151936 * 896) * 4  # tied embeddings: for lookups, and packed for products
    caches = found["kv_tokens"] * 2 * 24 * 2 * 64 * 4
    workload = Workload(context_tokens=DECODE.prompt_tokens + DECODE.new_tokens // 2, sequences=streams)
    config = find_model_config("qwen2-0.5b")
    activations = sum(activation_bytes(config, workload, 4, last=index == count - 1) for index in range(count))
    expected = weights + caches + activations + count * (200 << 20)
    assert found["memory_mib"] * 2**20 == pytest.approx(expected, rel=0.02)
    assert DECODE.new_tokens < found["output_tokens_per_s"] * 100
