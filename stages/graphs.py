"""Decode steps as CUDA graphs: the launches of all layers, recorded once for a number of rows and repeated with one call
(CUDA C++ Programming Guide, "CUDA Graphs"). Not yet run on a GPU.

A graph does again what was recorded, on the same memory. So the numbers of a step are brought into buffers that never move, rows are
padded to one of few numbers, and what is recorded may look at tensors alone: the Python numbers it sees are those of the largest step.
A row that pads has one token, whose keys and values go to a block that the pipeline does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.attention.base import AttentionContext
from stages.kv_cache import KVCache
from stages.models.qwen2 import Qwen2Stage

MAX_ROWS = 256
WARM_UP_RUNS = 2  # before capture, on another stream: kernels load and libraries take their workspace


class Recorder(Protocol):
    """What makes a graph."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What it returns does again what `function` does, on the same memory, and gives the same tensor, written anew."""
        ...


class CudaRecorder:
    """`cuda` is `torch.cuda`, or what stands in for it. All graphs share their memory: one runs at a time."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._pool = cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See Recorder."""
        computing, aside = self._cuda.current_stream(self._device), self._cuda.Stream(self._device)
        aside.wait_stream(computing)
        with self._cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                function()
        computing.wait_stream(aside)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph, pool=self._pool):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def padded_rows(num_rows: int) -> int:
    """Rows of the graph that takes so many: powers of two up to 8, then multiples of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


class DecodeGraphs:
    """The layers of one stage on decode steps. Graphs are recorded when a number of rows comes for the first time."""

    def __init__(
        self,
        model: Qwen2Stage,
        kv: KVCache,
        recorder: Recorder,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """The cache has a block beyond those of the pipeline (`spare_blocks`), and `max_rows` is a multiple of 8."""
        assert kv.spare_blocks
        assert model.attention.tensors_only
        self._model, self._kv, self._recorder, self._max_rows = model, kv, recorder, max_rows
        self._spare_block = kv.num_blocks
        self._capacity_tokens = kv.num_blocks * kv.block_size_tokens
        self._input_T = (
            torch.zeros(max_rows, dtype=torch.int64, device=device)
            if model.is_first
            else torch.zeros(max_rows, model.config.hidden_size, dtype=dtype, device=device)
        )
        self._starts_R1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._lengths_R = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._tables_RM = torch.zeros(max_rows, kv.num_blocks, dtype=torch.int32, device=device)
        self._positions_T = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots_T = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._graphs: dict[int, Callable[[], Tensor]] = {}

    def takes(self, context: AttentionContext) -> bool:
        """Whether every row decodes, and there are not too many."""
        return context.only_decodes and len(context.query_lens) <= self._max_rows

    def run(self, input_T: Tensor, context: AttentionContext) -> Tensor:
        """What `Qwen2Stage.forward` gives for the step, in memory of its own."""
        num_rows = len(context.query_lens)
        size = padded_rows(num_rows)
        self._input_T.narrow(0, 0, num_rows).copy_(input_T)
        self._lengths_R.narrow(0, 0, num_rows).copy_(context.context_lens_R)
        self._positions_T.narrow(0, 0, num_rows).copy_(context.positions_T)
        self._slots_T.narrow(0, 0, num_rows).copy_(context.slots_T)
        tables_RM = context.block_tables_RM
        # Further columns keep what an earlier step left there, ids of blocks that there are: lengths hide them.
        self._tables_RM.narrow(0, 0, num_rows).narrow(1, 0, tables_RM.shape[1]).copy_(tables_RM)
        if num_padding := size - num_rows:
            self._lengths_R.narrow(0, num_rows, num_padding).fill_(1)
            self._positions_T.narrow(0, num_rows, num_padding).fill_(0)
            self._slots_T.narrow(0, num_rows, num_padding).fill_(self._spare_block * self._kv.block_size_tokens)
            self._tables_RM.narrow(0, num_rows, num_padding).narrow(1, 0, 1).fill_(self._spare_block)
        if size not in self._graphs:
            self._graphs[size] = self._recorder.record(lambda: self._forward(size))
        out_TD = self._graphs[size]()
        return out_TD.narrow(0, 0, num_rows).clone()  # the next step writes to the graph's own

    def _forward(self, size: int) -> Tensor:
        context = AttentionContext(
            num_decode_rows=size,
            query_lens=(1,) * size,
            context_lens=(self._capacity_tokens,) * size,
            query_starts_R1=self._starts_R1.narrow(0, 0, size + 1),
            context_lens_R=self._lengths_R.narrow(0, 0, size),
            block_tables_RM=self._tables_RM.narrow(0, 0, size),
            positions_T=self._positions_T.narrow(0, 0, size),
            slots_T=self._slots_T.narrow(0, 0, size),
        )
        out_TD: Tensor = self._model(self._input_T.narrow(0, 0, size), context, self._kv)
        return out_TD
