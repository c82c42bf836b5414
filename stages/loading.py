"""Makes a stage ready to compute: opens the checkpoint, loads the layers, says how many KV blocks fit beside them."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from stageline.errors import ConfigError, InternalError, ResourceExhaustedError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.checkpoint import open_checkpoint
from stages.executor import StageExecutor
from stages.graphs import CudaRecorder
from stages.hidden_states import HiddenStateCodec
from stages.partition import LayerRange, kv_bytes_per_token, num_parameters
from stages.runner import DTYPES, StageRunner
from stages.server.loader import LoadedStage
from stages.spec import StageSpec
from stages.weights import load_weights

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

DEFAULT_CPU_KV_BYTES = 1 << 30
CUDA_KV_FRACTION = 0.9  # of the memory that is free once the weights are loaded
_QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}  # of a weight, without its scales
_ROOM = 0.9  # of an estimate, which must not refuse what would fit


async def on_ending_thread(function: Callable[[], _Result]) -> _Result:
    """The result of `function`, from a thread that ends with it.

    A thread that lives on keeps its OpenMP pool. With it and the compute thread's, libgomp counts more threads than cores and no
    longer spins at barriers but sleeps: some 290 context switches and half as much time again for each decode step.
    """
    pool = ThreadPoolExecutor(1, "stage-load")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, function)
    finally:
        pool.shutdown(wait=False)


class ModelLoader:
    """Loads stages of the model of a StageSpec, one at a time.

    `progress(done_bytes, total_bytes)` is called on the loading thread; without it a bar is drawn where stderr is a
    terminal.
    """

    def __init__(self, spec: StageSpec, progress: Callable[[int, int], None] | None = None) -> None:
        """Open the checkpoint, without its weights. Raises CheckpointError or ConfigError."""
        if spec.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "DEVICE_NOT_AVAILABLE", "device is 'cuda', but torch finds no CUDA device here; use --device cpu, or check "
                "the driver and that this torch was built for CUDA", field="device", value=spec.device,
            )  # fmt: skip
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        self._spec, self._progress = spec, progress
        self._device, self._dtype = torch.device(spec.device), DTYPES[spec.dtype]
        self._checkpoint = open_checkpoint(spec.model, revision=spec.revision)
        self.fingerprint, self.num_layers = self._checkpoint.fingerprint, self._checkpoint.config.num_layers
        self.memory_bytes = _free_bytes(self._device)

    def description(self) -> pb.DescribeResponse:
        """See StageLoader."""
        spec, config = self._spec, self._checkpoint.config
        hidden_states = HiddenStateCodec(self._dtype, config.hidden_size, spec.hidden_dtype)
        return pb.DescribeResponse(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=HiddenStateCodec(self._dtype, config.hidden_size, None).element_type,
            block_size_tokens=spec.block_size_tokens,
            batch_invariant=spec.batch_invariant,
            quantization=spec.quantization or "",
            hidden_dtype=hidden_states.element_type,
            memory_bytes=self.memory_bytes,
            model=spec.model,
        )

    def check(self, layers: LayerRange) -> None:
        """See StageLoader."""
        self._check_range(layers)
        needed_bytes = int(_ROOM * self._needed_bytes(layers))
        if needed_bytes > self.memory_bytes:
            raise ResourceExhaustedError(
                "STAGE_TOO_LARGE",
                f"layers {layers} need about {needed_bytes} bytes for weights and KV cache, and there are {self.memory_bytes}",
                needed_bytes=needed_bytes, memory_bytes=self.memory_bytes,
            )  # fmt: skip

    async def load(
        self, layers: LayerRange, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> LoadedStage:
        """See StageLoader. Raises also CheckpointError, and ConfigError where no KV cache fits."""
        return await on_ending_thread(lambda: self._load(layers, progress))

    def _check_range(self, layers: LayerRange) -> None:
        if not 0 <= layers.start_layer < layers.end_layer <= self.num_layers:
            raise ConfigError(
                "LAYERS_OUT_OF_RANGE", f"layers {layers} are not within the model's {self.num_layers} layers",
                field="stages.layers",
            )  # fmt: skip

    def _needed_bytes(self, layers: LayerRange) -> float:
        spec, config = self._spec, self._checkpoint.config
        weight_bytes = _QUANTIZED_BYTES.get(spec.quantization or "", self._dtype.itemsize)
        kv_bytes = spec.kv_memory_bytes or 0
        if spec.num_blocks is not None:
            kv_bytes = (
                kv_bytes_per_token(config, layers, self._dtype.itemsize) * spec.block_size_tokens * spec.num_blocks
            )
        return num_parameters(config, layers) * weight_bytes + kv_bytes

    def _load(self, layers: LayerRange, progress: Callable[[int, int], None]) -> LoadedStage:
        spec, checkpoint = self._spec, self._checkpoint
        self._check_range(layers)
        checkpoint.verify_index(layers)
        if self._device.type == "cuda":  # what a stage before this one left in torch's own pool
            gc.collect()
            torch.cuda.empty_cache()
        runner = StageRunner(
            checkpoint.config,
            layers,
            dtype=self._dtype,
            device=self._device,
            batch_invariant=spec.batch_invariant,
            block_size_tokens=spec.block_size_tokens,
            debug_kv=spec.debug_kv,
            quantization=spec.quantization,
            recorder=CudaRecorder(self._device) if spec.cuda_graphs else None,
        )
        hide = True if self._progress is not None else None  # None: a bar only on a terminal
        with tqdm(desc=f"layers {layers}", unit="B", unit_scale=True, file=sys.stderr, disable=hide) as bar:

            def tell(done: int, total: int) -> None:
                progress(done, total)
                if self._progress is not None:
                    self._progress(done, total)
                else:
                    bar.total = total
                    bar.update(done - bar.n)

            load_weights(checkpoint, layers, runner.model, dtype=self._dtype, progress=tell)
        missing = runner.model.missing()
        if missing:
            raise InternalError(
                "WEIGHTS_MISSING", f"layers {layers}: tensors were not loaded: {', '.join(sorted(missing))}"
            )
        _LOG.info("layers %s: %s", layers, runner.report(), extra={"layers": str(layers)})
        return LoadedStage(StageExecutor(runner, hidden_dtype=spec.hidden_dtype), self._kv_blocks(runner))

    def _kv_blocks(self, runner: StageRunner) -> int:
        spec = self._spec
        if spec.num_blocks is not None:
            return spec.num_blocks
        memory = spec.kv_memory_bytes
        if memory is None:
            on_cuda = runner.device.type == "cuda"
            memory = int(torch.cuda.mem_get_info()[0] * CUDA_KV_FRACTION) if on_cuda else DEFAULT_CPU_KV_BYTES
        blocks = runner.kv_capacity_blocks(memory)
        if blocks < 2:
            raise ConfigError(
                "KV_CACHE_TOO_SMALL", f"{memory} bytes hold {blocks} KV blocks of layers {runner.layers}; at least 2 are needed",
                field="kv_cache.memory_bytes", value=memory,
            )  # fmt: skip
        return blocks


def _free_bytes(device: torch.device) -> int:
    """Of the device; on the CPU of this machine, or what its control group still leaves this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = 1 << 62
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    with suppress(OSError, ValueError):  # no control group, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        free = min(free, max(0, int(limit) - int(used)))
    return free
