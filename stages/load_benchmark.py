"""How fast a stage's weights load, against plain reading of the same bytes: run by `stageline bench load`.

`python -m stages.load_benchmark SPEC_JSON` prints one JSON object. Cold and warm page cache, plain and loading, in turn.
Peak memory is that of a process which does nothing but load one stage and allocate its KV cache.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stages.checkpoint import Checkpoint, open_checkpoint
from stages.partition import LayerRange, tensor_shapes
from stages.runner import DTYPES, StageRunner
from stages.weights import load_weights
from stages.weights.reading import FilePart, find_parts

BUFFER_BYTES = 8 << 20
KV_BYTES = 64 << 20


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: model, layers (start-end or empty for all), dtype, repeats."""
    checkpoint = open_checkpoint(spec["model"])
    layers = layers_of(spec, checkpoint)
    shards = [checkpoint.shard_path(name) for name in checkpoint.shards_for(layers)]
    parts = find_parts(shards, set(tensor_shapes(checkpoint.config, layers)))
    parts.sort(key=lambda part: (part.path, part.begin))
    seconds: dict[str, list[float]] = {name: [] for name in ("plain_cold", "load_cold", "plain_warm", "load_warm")}
    for turn in range(spec["repeats"] + 1):
        for temperature in ("cold", "warm"):
            for what in ("plain", "load"):
                if temperature == "cold":
                    evict(shards)
                began_s = time.perf_counter()
                if what == "plain":
                    read_plainly(parts)
                else:
                    load(spec, checkpoint, layers)
                if turn:  # the first turn warms up
                    seconds[f"{what}_{temperature}"].append(time.perf_counter() - began_s)
    num_bytes = sum(part.end - part.begin for part in parts)
    ratios = {
        temperature: statistics.median(
            plain / loading
            for plain, loading in zip(seconds[f"plain_{temperature}"], seconds[f"load_{temperature}"], strict=True)
        )
        for temperature in ("cold", "warm")
    }
    return {
        "layers": str(layers),
        "file_bytes": num_bytes,
        "gb_per_s": {name: round(num_bytes / statistics.median(of) / 1e9, 2) for name, of in seconds.items()},
        "load_over_plain": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "memory": peak_memory(spec),
    }


def layers_of(spec: dict[str, Any], checkpoint: Checkpoint) -> LayerRange:
    """The range asked for, or the whole model."""
    start, _, end = spec["layers"].partition("-")
    return LayerRange(int(start), int(end)) if end else LayerRange(0, checkpoint.config.num_layers)


def load(spec: dict[str, Any], checkpoint: Checkpoint, layers: LayerRange) -> StageRunner:
    """One stage's model with its weights, in the form it computes with."""
    dtype = DTYPES[spec["dtype"]]
    runner = StageRunner(checkpoint.config, layers, dtype=dtype, device=torch.device("cpu"))
    load_weights(checkpoint, layers, runner.model, dtype=dtype)
    return runner


def read_plainly(parts: list[FilePart]) -> None:
    """The same bytes in the order of the files, through one buffer."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for part in parts:
        with open(part.path, "rb", buffering=0) as file:
            file.seek(part.begin)
            left = part.end - part.begin
            while left:
                left -= file.readinto(buffer[: min(left, BUFFER_BYTES)])


def evict(paths: list[Path]) -> None:
    """Drop the files' pages from the page cache, as far as the kernel follows the advice."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # dirty pages stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory(spec: dict[str, Any]) -> dict[str, int]:
    """Bytes of a process of its own, measured by the kernel (VmHWM)."""
    command = [sys.executable, "-m", "stages.load_benchmark", json.dumps({**spec, "memory_only": True})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, int] = json.loads(done.stdout)
    return answer


def measure_memory(spec: dict[str, Any]) -> dict[str, int]:
    """Load once in this process."""
    checkpoint = open_checkpoint(spec["model"])
    layers = layers_of(spec, checkpoint)
    imported = vm_hwm_bytes()
    runner = load(spec, checkpoint, layers)
    runner.allocate_kv(max(2, runner.kv_capacity_blocks(KV_BYTES)))
    weights = sum(map(math.prod, tensor_shapes(checkpoint.config, layers).values())) * runner.dtype.itemsize
    peak = vm_hwm_bytes()
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": KV_BYTES,
        "process_before_bytes": imported,
        "peak_bytes": peak,
        "beyond_weights_and_kv_bytes": peak - weights - KV_BYTES,
    }


def vm_hwm_bytes() -> int:
    """The most memory this process ever had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> int:
    """See the module's docstring."""
    spec = json.loads(sys.argv[1])
    print(json.dumps(measure_memory(spec) if spec.get("memory_only") else run(spec)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
