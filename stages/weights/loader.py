"""Loads the tensors of a layer range: several threads read, one hands on, and only the files that hold them are opened.

Bytes are read straight to where they belong where the file's dtype is the stage's and the device is the CPU; otherwise a
few MiB at a time. So little besides the weights is in memory, whatever the size of a shard or tensor.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Generator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch

from stageline.errors import CheckpointError
from stages.checkpoint import Checkpoint
from stages.gguf_container import read_gguf
from stages.gguf_file import dequantize, tensors_by_hf_name
from stages.partition import EMBEDDING, LM_HEAD, LayerRange, tensor_shapes
from stages.weights.reading import FilePart, find_parts, parts_differ, read_into

_LOG = logging.getLogger(__name__)

# Storage that is far away (a network volume, cold NVMe) needs several requests at a time; more than the cores only wait.
MAX_READERS = 8
# Tensors read ahead of the one that is handed on, for each reader.
READ_AHEAD = 2


class WeightSink(Protocol):
    """What the weights are loaded into."""

    def target(self, name: str) -> torch.Tensor:
        """Where a tensor goes: contiguous, of its shape, in the stage's dtype, on its device. Called once a name."""
        ...

    def loaded(self, name: str) -> None:
        """The target holds the whole tensor. Called once a name, always on the thread that loads."""
        ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: tensors, their bytes in the stage's dtype, the files opened (in order), and the time."""

    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    seconds: float


def load_weights(
    checkpoint: Checkpoint,
    layers: LayerRange,
    sink: WeightSink,
    *,
    dtype: torch.dtype,
    num_readers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill every target of the stage, under its Hugging Face name, each once.

    `num_readers` threads read; by default as many as there are cores, up to eight. `progress(done_bytes, total_bytes)`
    is called before the first tensor and after each, in bytes of `dtype`, on the calling thread.

    The checkpoint is verified first. Raises CheckpointError (as `Checkpoint.verify_index`; SHARD_UNREADABLE;
    TIED_HEAD_DIFFERS), the hub's errors, and what `sink` raises; no thread is left behind then.
    """
    started_s = time.monotonic()
    checkpoint.verify_index(layers)
    shapes = tensor_shapes(checkpoint.config, layers)
    total_bytes = sum(map(math.prod, shapes.values())) * dtype.itemsize
    done_bytes = num_tensors = 0
    if progress is not None:
        progress(0, total_bytes)
    readers = num_readers or min(MAX_READERS, len(os.sched_getaffinity(0)))
    stream = _from_gguf(checkpoint, shapes.keys(), sink) if checkpoint.kind == "gguf" else (
        _from_safetensors(checkpoint, layers, shapes.keys(), sink, readers)
    )  # fmt: skip
    with closing(stream):  # where `sink` raises, readers end before the error is seen
        for name in stream:
            sink.loaded(name)
            num_tensors += 1
            done_bytes += math.prod(shapes[name]) * dtype.itemsize
            if progress is not None:
                progress(done_bytes, total_bytes)
    assert done_bytes == total_bytes, f"{num_tensors} of {len(shapes)} tensors were loaded"
    report = LoadReport(num_tensors, done_bytes, checkpoint.shards_for(layers), time.monotonic() - started_s)
    _LOG.info(
        "layers %s: %d tensors, %d bytes from %s in %.1f s",
        layers,
        report.num_tensors,
        report.num_bytes,
        ", ".join(report.files),
        report.seconds,
    )
    return report


def reading_order(parts: Sequence[FilePart], layers: LayerRange, num_layers: int) -> list[FilePart]:
    """Files in turn, each in the order of its data, beginning at a file that depends on the stage.

    Stages that start together and share files (all of them, where the model is one file) then read different parts of
    them: of one file, a stage begins where its own layers are, since it reads nothing else.
    """
    files = sorted({part.path for part in parts})
    first = len(files) * layers.start_layer // num_layers
    rank = {path: (index - first) % len(files) for index, path in enumerate(files)}
    return sorted(parts, key=lambda part: (rank[part.path], part.begin))


def _from_safetensors(
    checkpoint: Checkpoint, layers: LayerRange, wanted: Set[str], sink: WeightSink, readers: int
) -> Generator[str, None, None]:
    """Names, as their targets are filled."""
    paths = [checkpoint.shard_path(shard) for shard in checkpoint.shards_for(layers)]
    found = find_parts(paths, {*wanted, LM_HEAD})
    parts = [part for part in found if part.name in wanted]
    if checkpoint.config.tie_word_embeddings and layers.is_last(checkpoint.config):
        _check_tied_head({part.name: part for part in found})
    waiting = iter(reading_order(parts, layers, checkpoint.config.num_layers))
    with ThreadPoolExecutor(readers, thread_name_prefix="weights") as pool:
        reading: dict[Future[None], str] = {}
        try:
            while True:
                while len(reading) < readers * READ_AHEAD and (part := next(waiting, None)) is not None:
                    reading[pool.submit(read_into, part, sink.target(part.name))] = part.name
                if not reading:
                    return
                done, _ = wait(reading, return_when=FIRST_COMPLETED)
                for future in done:
                    name = reading.pop(future)
                    future.result()
                    yield name
        finally:
            pool.shutdown(cancel_futures=True)


def _from_gguf(checkpoint: Checkpoint, wanted: Set[str], sink: WeightSink) -> Generator[str, None, None]:
    """Names in the order of the file's data, as their targets are filled; one at a time, since each passes through float32."""
    file = read_gguf(checkpoint.path)
    tensors = tensors_by_hf_name(file)
    for name in sorted(wanted, key=lambda name: tensors[name].begin):
        sink.target(name).copy_(torch.from_numpy(dequantize(file, checkpoint.config, tensors[name])))
        yield name


def _check_tied_head(parts: dict[str, FilePart]) -> None:
    """Raise CheckpointError (TIED_HEAD_DIFFERS) if there is an lm_head and it is no copy of the embedding.

    transformers ties the two only where they are equal, and else keeps both whatever `tie_word_embeddings` says.
    """
    head = parts.get(LM_HEAD)
    if head is None or not parts_differ(head, parts[EMBEDDING]):
        return
    raise CheckpointError(
        "TIED_HEAD_DIFFERS",
        f"{LM_HEAD} in {head.path.name} differs from {EMBEDDING}, but "
        "config.json says tie_word_embeddings; set it to false to serve both",
        tensor=LM_HEAD,
        shard=head.path.name,
    )
