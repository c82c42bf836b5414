"""One running stage: opens the checkpoint, loads its layers, serves them. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from stageline.errors import ConfigError, InternalError
from stages.checkpoint import open_checkpoint
from stages.executor import StageExecutor
from stages.graphs import CudaRecorder
from stages.partition import LayerRange
from stages.runner import DTYPES, StageRunner
from stages.server.access import StageAccess
from stages.server.server import Listener, StageServer
from stages.spec import ACCESS_FIELDS, StageSpec
from stages.weights import load_weights

__all__ = ["StageReplica", "StageSpec"]

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

DEFAULT_CPU_KV_BYTES = 1 << 30
CUDA_KV_FRACTION = 0.9  # of the memory that is free once the weights are loaded


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


class StageReplica:
    """Loads and serves the stage of a StageSpec.

    `progress(done_bytes, total_bytes)` is called on the loading thread; without it a bar is drawn where stderr is a
    terminal.
    """

    def __init__(self, spec: StageSpec, progress: Callable[[int, int], None] | None = None) -> None:
        self.spec, self._progress = spec, progress
        self.address = ""
        self._server: StageServer | None = None
        self._metadata: dict[str, Any] = {}

    async def start(self) -> None:
        """Load the weights and listen. Raises CheckpointError or ConfigError."""
        spec = self.spec
        access = StageAccess(**{name: getattr(spec, name) for name in ACCESS_FIELDS})
        listener = Listener(spec.host, spec.port, access)
        executor, fingerprint, capacity = await on_ending_thread(self._load)
        self._server = StageServer(
            executor,
            fingerprint=fingerprint,
            kv_capacity_blocks=capacity,
            queue_depth_steps=spec.queue_depth_steps,
            shared_memory_bytes=spec.shared_memory_bytes,
        )
        port = await self._server.start_on(listener)
        self.address = f"{spec.host}:{port}"
        self._metadata = {
            "address": self.address,
            "incarnation": self._server.incarnation,
            "fingerprint": fingerprint,
            "start_layer": spec.start_layer,
            "end_layer": spec.end_layer,
            "num_layers": executor.runner.config.num_layers,
            "pid": os.getpid(),
            "node": spec.host,
        }

    def _load(self) -> tuple[StageExecutor, str, int]:
        spec = self.spec
        if spec.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "DEVICE_NOT_AVAILABLE", "device is 'cuda', but torch finds no CUDA device here; use --device cpu, or check "
                "the driver and that this torch was built for CUDA", field="device", value=spec.device,
            )  # fmt: skip
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        checkpoint = open_checkpoint(spec.model, revision=spec.revision)
        config, layers = checkpoint.config, LayerRange(spec.start_layer, spec.end_layer)
        if not 0 <= layers.start_layer < layers.end_layer <= config.num_layers:
            raise ConfigError(
                "LAYERS_OUT_OF_RANGE", f"layers {layers} are not within the model's {config.num_layers} layers",
                field="stages.layers",
            )  # fmt: skip
        checkpoint.verify_index(layers)
        device = torch.device(spec.device)
        runner = StageRunner(
            config,
            layers,
            dtype=DTYPES[spec.dtype],
            device=device,
            batch_invariant=spec.batch_invariant,
            block_size_tokens=spec.block_size_tokens,
            debug_kv=spec.debug_kv,
            quantization=spec.quantization,
            recorder=CudaRecorder(device) if spec.cuda_graphs else None,
        )
        hide = True if self._progress is not None else None  # None: a bar only on a terminal
        with tqdm(desc=f"layers {layers}", unit="B", unit_scale=True, file=sys.stderr, disable=hide) as bar:

            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            dtype, progress = DTYPES[spec.dtype], self._progress or draw
            load_weights(checkpoint, layers, runner.model, dtype=dtype, progress=progress)
        missing = runner.model.missing()
        if missing:
            raise InternalError(
                "WEIGHTS_MISSING", f"layers {layers}: tensors were not loaded: {', '.join(sorted(missing))}"
            )
        _LOG.info("layers %s: %s", layers, runner.report())
        return StageExecutor(runner, hidden_dtype=spec.hidden_dtype), checkpoint.fingerprint, self._kv_blocks(runner)

    def _kv_blocks(self, runner: StageRunner) -> int:
        spec = self.spec
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

    def metadata(self) -> dict[str, Any]:
        """Where and what this replica is; plain values."""
        return dict(self._metadata)

    def check_health(self) -> None:
        """Raises InternalError where the stage cannot compute any more."""
        if self._server is not None and self._server.busy_s() > self.spec.stall_timeout_s:
            raise InternalError("STAGE_STALLED", f"one step has been running for {self._server.busy_s():.0f} s")
        if self._server is None or self._server.failure is not None:
            raise InternalError(
                "STAGE_UNHEALTHY", f"the stage stopped computing: {self._server and self._server.failure!r}"
            )

    async def drain(self) -> None:
        """Take no new claim, tell the owner, and wait until it let go of this stage, for at most `spec.drain_timeout_s`."""
        if self._server is not None:
            await self._server.drain(self.spec.drain_timeout_s)
            await self._server.drained()

    async def stop(self) -> None:
        """End everything."""
        if self._server is not None:
            await self._server.stop()
