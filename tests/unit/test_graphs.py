"""Decode steps that are recorded once and repeated, against the same layers called each time.

The recorder traces operators with make_fx: as with a CUDA graph, Python runs once, and what is repeated reads and writes the memory
of then.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import stages.runner
from stageline.errors import ConfigError
from stages.attention.base import AttentionContext
from stages.attention.portable import PortableAttention
from stages.graphs import CudaRecorder, padded_rows
from stages.spec import StageSpec
from tests.stage_chain import Chain
from tests.tiny import save_tiny


class TensorAttention(PortableAttention):
    """Decode rows by tensors alone: whole block tables, and a mask by length."""

    tensors_only = True

    def forward(self, q_TNH, keys_BSKH, values_BSKH, context: AttentionContext, window: int | None) -> Tensor:
        if context.num_decode_rows < len(context.query_lens):
            return super().forward(q_TNH, keys_BSKH, values_BSKH, context, window)
        rows, heads, head_dim = q_TNH.shape
        kv_heads = keys_BSKH.shape[2]
        k_RLKH, v_RLKH = (
            cache.index_select(0, context.block_tables_RM.flatten()).view(rows, -1, kv_heads, head_dim)
            for cache in (keys_BSKH, values_BSKH)
        )
        hidden_RL = torch.arange(k_RLKH.shape[1]) >= context.context_lens_R.unsqueeze(1)
        scores = torch.einsum("rkgh,rlkh->rkgl", q_TNH.view(rows, kv_heads, -1, head_dim), k_RLKH) / head_dim**0.5
        weights = scores.masked_fill(hidden_RL[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("rkgl,rlkh->rkgh", weights, v_RLKH).reshape(rows, heads, head_dim)


class TracingRecorder:
    def __init__(self) -> None:
        self.num_recorded = self.num_repeated = 0

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        traced = make_fx(function)()

        def repeat() -> Tensor:
            self.num_repeated += 1
            return traced()

        return repeat


def test_recorded_steps_give_what_called_ones_give(tmp_path, monkeypatch) -> None:
    save_tiny(tmp_path)
    num_layers = json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"]
    monkeypatch.setattr(stages.runner, "make_attention", lambda **_: TensorAttention())
    recorder = TracingRecorder()
    options = {"debug_kv": False, "packed_weights": False, "num_blocks": 24}
    plain = Chain(tmp_path, [0, 1, num_layers], **options)
    graphs = Chain(tmp_path, [0, 1, num_layers], recorder=recorder, **options)
    rng = np.random.default_rng(1)
    lengths = dict.fromkeys(range(7), 0)

    def step(rows: list[tuple[int, int]]) -> None:
        made = []
        for sequence, count in rows:
            lengths[sequence] += count
            tokens = rng.integers(0, plain.vocab_size, count).tolist()
            made.append((sequence, tokens, lengths[sequence]))
        expected, got = plain.step(made), graphs.step(made)
        for sequence in expected:
            torch.testing.assert_close(got[sequence], expected[sequence], rtol=1e-4, atol=1e-4)

    step([(sequence, 5 + 7 * sequence) for sequence in range(6)])  # prompts are not recorded
    assert recorder.num_recorded == 0
    for _ in range(3):
        step([(sequence, 1) for sequence in range(6)])
    step([(6, 3), (0, 1)])  # nor is a mixed step
    for rows in ([0], [1, 2, 6], [3, 4, 5], [6, 5, 4, 3, 2, 1, 0], [2]):
        step([(sequence, 1) for sequence in rows])
    sizes = {padded_rows(n) for n in (6, 1, 3, 3, 7, 1)}
    assert recorder.num_recorded == 2 * len(sizes), "each stage records a number of rows once"
    assert recorder.num_repeated == 2 * 8


def test_rows_are_padded_to_few_sizes() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 250, 256)] == [1, 2, 4, 8, 8, 16, 16, 24, 256, 256]


def test_a_graph_is_captured_after_warm_up_on_another_stream() -> None:
    calls: list[str] = []

    class Cuda:
        """Writes down what it is asked for."""

        def graph_pool_handle(self) -> str:
            return "pool"

        def current_stream(self, device):
            return Stream("computing")

        def Stream(self, device):
            return Stream("aside")

        def CUDAGraph(self):
            return Graph()

        @contextlib.contextmanager
        def stream(self, stream):
            calls.append(f"on {stream.name}")
            yield
            calls.append("back")

        @contextlib.contextmanager
        def graph(self, graph, pool):
            calls.append(f"capture in {pool}")
            yield
            calls.append("captured")

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    out = torch.zeros(1)

    def function() -> Tensor:
        calls.append("run")
        return out

    replay = CudaRecorder(torch.device("cpu"), Cuda()).record(function)
    assert calls == [
        "aside waits for computing", "on aside", "run", "run", "back", "computing waits for aside",
        "capture in pool", "run", "captured",
    ]  # fmt: skip
    assert replay() is out
    assert calls[-1] == "replay"


@pytest.mark.parametrize("wrong", [{"device": "cpu"}, {"device": "cuda", "batch_invariant": True}])
def test_where_nothing_can_be_recorded_it_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs"):
        StageSpec(model="m", start_layer=0, end_layer=1, cuda_graphs=True, **wrong)
